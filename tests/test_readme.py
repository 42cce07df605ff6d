"""README.md says nothing that does not run, and no document points where nothing is."""

import re
import shlex

import pytest
import torch

from cin_fast import config as configs
from cin_fast import reproduce


@pytest.fixture(scope="module")
def text(repository):
    return (repository / "README.md").read_text()


@pytest.mark.slow
def test_the_example_runs_as_it_stands(text):
    (example,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(example.splitlines()) == 8
    names = {}
    exec(example, names)
    assert names["y"].shape == names["x"].shape
    assert names["logits"].shape == (4, 200)
    assert names["embeddings"].shape == (4, 512)
    assert torch.isfinite(names["embeddings"]).all()


def heading_anchors(document):
    """As GitHub makes them: of a heading's words, lower case, joined by hyphens."""
    for heading in re.findall(r"^#+ (.*)$", document.read_text(), re.MULTILINE):
        yield re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def test_every_link_leads_somewhere(repository):
    documents = [path for pattern in ("*.md", "docs/**/*.md", "bench/**/*.md")
                 for path in repository.glob(pattern)]  # fmt: skip
    links = [(document, target) for document in documents
             for target in re.findall(r"\]\(([^)\s]+)\)", document.read_text())
             if "://" not in target]  # fmt: skip
    broken = []
    for document, target in links:
        path, _, anchor = target.partition("#")
        place = document.parent / path if path else document
        if not place.exists() or (anchor and anchor not in heading_anchors(place)):
            broken.append(f"{document.relative_to(repository)}: {target}")
    assert len(links) >= 15
    assert not broken


def test_its_training_commands_are_understood(text):
    code = "\n".join(line for line in text.splitlines() if line.startswith("    "))
    lines = [re.sub(r"\s+#.*", "", line).strip() for line in code.replace("\\\n", " ").split("\n")]
    found = {"cin-fast-train": configs.parse, "cin-fast-reproduce": reproduce.parse}
    parsed = [
        found[words[0]](words[1:]) for line in lines if (words := shlex.split(line))[:1]
        and words[0] in found
    ]  # fmt: skip
    assert len(parsed) >= 5
