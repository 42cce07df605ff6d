"""The options of a run that takes a second or two."""

SMALL = {
    "--dataset": "folder",
    "--image-size": "32",
    "--backbone": "resnet18",
    "--weights": "none",
    "--classes-per-batch": "2",
    "--images-per-class": "2",
    "--workers": "0",
    "--embedding-dim": "8",
    "--device": "cpu",
}


def arguments(images, output, **changes):
    """SMALL on a folder of images, with changes."""
    options = {**SMALL, "--data-root": str(images), "--output": str(output)}
    options |= {"--" + name.replace("_", "-"): str(value) for name, value in changes.items()}
    return [part for option in options.items() for part in option]
