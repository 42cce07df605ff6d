"""The schema of every registered operator, by its name less the backend's prefix.

Plain text, without imports: setup.py writes what an extension was built for into the build record,
and :mod:`cin_fast.dispatch` loads none that was built for other schemas.
"""

from __future__ import annotations

# Of every backend.
OPERATORS = {
    # y, row_max, row_sum, y_rest.
    "sci": "(Tensor x, Tensor? v, float scale) -> (Tensor, Tensor, Tensor, Tensor)",
    "sci_backward": (
        "(Tensor dy, Tensor x, Tensor? v, Tensor y, Tensor row_max, Tensor row_sum, Tensor y_rest,"
        " float scale) -> (Tensor, Tensor)"
    ),
    "cci": (
        "(Tensor x, Tensor partner, Tensor eta, Tensor? v, float scale)"
        " -> (Tensor, Tensor, Tensor, Tensor)"
    ),
    "cci_backward": (
        "(Tensor dy, Tensor x, Tensor partner, Tensor eta, Tensor? v, Tensor y, Tensor b,"
        " Tensor row_max, Tensor row_sum, float scale) -> (Tensor, Tensor, Tensor)"
    ),
}
# y alone, where nobody asks for a gradient: what the backward pass would need is not computed.
VALUES = {
    "sci_values": "(Tensor x, Tensor? v, float scale) -> Tensor",
    "cci_values": "(Tensor x, Tensor partner, Tensor eta, Tensor? v, float scale) -> Tensor",
}
TAP_MEANS = {
    "tap_means": "(Tensor x) -> Tensor",
    "tap_means_backward": "(Tensor dv, SymInt height, SymInt width) -> Tensor",
}
PAIR = {
    # y, y_pair; and for the backward pass eta, cci's partner term b, and sci's row statistics.
    "pair": (
        "(Tensor x, Tensor partner, Tensor psi_weight, Tensor psi_bias, Tensor v, int mean,"
        " float scale) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
    ),
    # Of x, psi_weight, psi_bias and v. Without `sweep`, those of x and v are empty.
    "pair_backward": (
        "(Tensor dy, Tensor dy_pair, Tensor x, Tensor partner, Tensor psi_weight, Tensor psi_bias,"
        " Tensor v, Tensor y, Tensor y_pair, Tensor eta, Tensor b, Tensor row_max, Tensor row_sum,"
        " int mean, float scale, bool sweep) -> (Tensor, Tensor, Tensor, Tensor)"
    ),
}
# y and b of cci, where sci of the same x has left row_max and row_sum.
AFTER_SCI = {
    "cci_after_sci": (
        "(Tensor x, Tensor partner, Tensor eta, Tensor v, Tensor row_max, Tensor row_sum,"
        " float scale) -> (Tensor, Tensor)"
    ),
}
# Of the pair, what the extension computes of the backward pass.
PAIR_SWEEP = {
    "pair_sweep": (
        "(Tensor dy, Tensor dy_pair, Tensor x, Tensor partner, Tensor eta, Tensor v, Tensor y,"
        " Tensor y_pair, Tensor b, Tensor row_max, Tensor row_sum, float scale)"
        " -> (Tensor, Tensor)"
    ),
}
THIN_LINEAR = {
    "thin_linear": "(Tensor a, Tensor w) -> Tensor",
    "thin_linear_input": "(Tensor dy, Tensor w) -> Tensor",
    "thin_linear_weight": "(Tensor dy, Tensor a) -> Tensor",
}
# Passes over the matrices of the matmul backend. Results of the first two may take the arguments'
# memory; `partner` says where among the group's images each one's is.
MATRIX_ROWS = {
    "softmax_rows": "(Tensor(a!) weights, Tensor logits, float scale) -> ()",
    "softmax_rows_backward": (
        "(Tensor(a!) weights, Tensor(b!) ds, Tensor logits, Tensor dp, float scale) -> ()"
    ),
    "cci_rows": (
        "(Tensor(a!) weights, Tensor logits, Tensor partner, Tensor eta, float scale) -> ()"
    ),
    "cci_rows_backward": (
        "(Tensor(a!) weights, Tensor(b!) ds, Tensor(c!) deta, Tensor logits, Tensor d,"
        " Tensor partner, Tensor eta, float scale) -> ()"
    ),
}
# Bytes of scratch memory that were kept for the next call, and no longer are.
KEPT_MEMORY = {"release_kept": "() -> int"}

# Backend of a compiled extension -> what it holds.
COMPILED = {
    "cpu": OPERATORS | VALUES | TAP_MEANS | AFTER_SCI | PAIR_SWEEP | THIN_LINEAR | KEPT_MEMORY,
    "cuda": OPERATORS | {"sci_values": VALUES["sci_values"]} | TAP_MEANS | AFTER_SCI | MATRIX_ROWS,
}
