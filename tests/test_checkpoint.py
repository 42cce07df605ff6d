"""A checkpoint and its hash: whole after any kill, and refused where it is not."""

import dataclasses
import os

import pytest
import torch

from cin_fast import checkpoint as checkpoints


@pytest.fixture
def path(tmp_path):
    return tmp_path / "last.pt"


@pytest.fixture
def one():
    return checkpoints.Checkpoint(
        model={"weight": torch.randn(300)},
        settings={"seed": 0},
        classes=("finch", "owl"),
        epoch=4,
        optimizer={},
        schedule={},
        rng=torch.get_rng_state(),
        history={"seconds": 1.0},
    )


def test_a_checkpoint_that_is_not_its_hashs_is_refused(one, path):
    checkpoints.save(path, one)
    damaged = bytearray(path.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(checkpoints.CheckpointError, match=r"is damaged: its hash is not the one"):
        checkpoints.load(path)
    path.with_name("last.pt.sha256").write_bytes(b"\xff\xfe")
    with pytest.raises(checkpoints.CheckpointError, match=r"is damaged: its hash is not the one"):
        checkpoints.load(path)
    path.with_name("last.pt.sha256").unlink()
    assert checkpoints.load(path).epoch == 4


def test_a_kill_between_checkpoint_and_hash_leaves_both_right(one, path, monkeypatch):
    checkpoints.save(path, one)
    replace = os.replace
    for renamed in (1, 2):
        done = []

        def until(source, target, renamed=renamed, done=done):
            if len(done) == renamed:
                raise KeyboardInterrupt
            done.append(target)
            replace(source, target)

        with monkeypatch.context() as patched:
            patched.setattr(os, "replace", until)
            with pytest.raises(KeyboardInterrupt):
                checkpoints.save(path, dataclasses.replace(one, epoch=renamed + 4))
        # The hash comes first, and names both; then the checkpoint.
        assert checkpoints.load(path).epoch == (4 if renamed == 1 else 6)


def test_a_checkpoint_outlives_two_kills_after_its_hash(one, path, monkeypatch):
    checkpoints.save(path, one)
    replace = os.replace

    def the_hash_alone(source, target):
        if target == path:
            raise KeyboardInterrupt
        replace(source, target)

    for epoch in (5, 6):
        with monkeypatch.context() as patched:
            patched.setattr(os, "replace", the_hash_alone)
            with pytest.raises(KeyboardInterrupt):
                checkpoints.save(path, dataclasses.replace(one, epoch=epoch))
        assert checkpoints.load(path).epoch == 4
    checkpoints.save(path, one)
    assert len(path.with_name("last.pt.sha256").read_text().splitlines()) == 1
