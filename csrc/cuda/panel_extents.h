// What a tensor map says of an operand in panels, for ptx.cuh and for the emulation of it.
#pragma once

// Panels of 16 16-bit columns, rows counted in groups of 16: `groups` one after another make a
// turn; turns are `step` groups apart, panels `height`.
struct PanelExtents {
  int images, panels, turns, groups;
};
struct PanelStrides {
  int height, step;
};
