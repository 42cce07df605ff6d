"""cin-fast-data verify and list: a whole set passes, and everything wrong with one is named."""

import shutil

import pytest
from test_aircraft import write_aircraft

from cin_fast.data.cli import main


@pytest.fixture
def birds(tmp_path, capsys):
    root = tmp_path / "birds"
    small = ["--classes", "3", "--images-per-class", "5", "--image-size", "32"]
    assert main(["synthesize", "--output", str(root), *small]) == 0
    capsys.readouterr()
    return root


def verify(name, root, capsys):
    code = main(["verify", name, "--data-root", str(root)])
    return code, capsys.readouterr().out


def test_a_whole_set_passes(birds, capsys):
    code, out = verify("cub", birds, capsys)
    assert code == 0
    assert "training      15 images, 5 to 5 a class" in out
    assert "test           6 images, 2 to 2 a class" in out
    assert "decoded       21 of 21" in out
    assert out.rstrip().endswith("all good")


def test_images_that_do_not_decode_are_named(birds, capsys):
    cut, gone = sorted((birds / "images").rglob("*.jpg"))[:2]
    cut.write_bytes(cut.read_bytes()[:200])
    gone.unlink()
    code, out = verify("cub", birds, capsys)
    assert code == 1
    assert "2 problems:" in out
    assert cut.name in out
    assert gone.name in out


def test_a_class_without_test_images_is_named(birds, capsys):
    split = birds / "train_test_split.txt"
    labels = dict(
        line.split() for line in (birds / "image_class_labels.txt").read_text().splitlines()
    )
    lines = [line.split() for line in split.read_text().splitlines()]
    split.write_text("".join(f"{i} {'1' if labels[i] == '2' else s}\n" for i, s in lines))
    code, out = verify("cub", birds, capsys)
    assert code == 1
    assert "1 problem:" in out
    assert "has no test image" in out


def test_a_single_class_is_named(birds, tmp_path, capsys):
    one = next((birds / "images").iterdir())
    for split in ("train", "test"):
        shutil.copytree(one, tmp_path / "one" / split / "sparrow")
    code, out = verify("folder", tmp_path / "one", capsys)
    assert code == 1
    assert "has a single class, sparrow: training takes at least two" in out


@pytest.fixture
def folders(tmp_path, capsys):
    root = tmp_path / "folders"
    small = ["--classes", "2", "--images-per-class", "2", "--image-size", "32"]
    assert main(["synthesize", "--output", str(root), "--layout", "folder", *small]) == 0
    capsys.readouterr()
    return root


@pytest.mark.parametrize("copy", [shutil.copytree, lambda old, new: new.symlink_to(old)])
def test_a_test_set_that_is_the_training_set_is_seen(folders, capsys, copy):
    shutil.rmtree(folders / "test")
    copy(folders / "train", folders / "test")
    code, out = verify("folder", folders, capsys)
    assert code == 1
    assert "4 problems:" in out
    one = sorted((folders / "train").rglob("*.jpg"))[0]
    other = folders / "test" / one.relative_to(folders / "train")
    assert f"  {one} and {other} are one image, which is in both splits\n" in out


def test_an_image_of_two_classes_is_seen(birds, capsys):
    finch, rail = sorted((birds / "images").rglob("*_0001.jpg"))[:2]
    shutil.copy(finch, rail)
    # A copy within its class and split does no harm.
    shutil.copy(finch, finch.with_name(finch.name.replace("1", "2")))
    code, out = verify("cub", birds, capsys)
    assert code == 1
    classes = f"{finch.parent.name} and {rail.parent.name}"
    assert "1 problem:" in out
    assert f"{finch} and {rail} are one image, which has two classes, {classes}\n" in out
    shutil.copy(finch, sorted(rail.parent.iterdir())[-1])
    assert (
        f"which is in both splits and has two classes, {classes}" in verify("cub", birds, capsys)[1]
    )


def test_bad_images_are_no_copies_of_each_other(birds, capsys):
    for file in sorted((birds / "images").rglob("*_0001.jpg")):
        file.write_bytes(b"")
    assert "one image" not in verify("cub", birds, capsys)[1]


def test_files_that_are_left_out_for_their_names_are_counted(folders, capsys):
    file = next((folders / "train").rglob("*.jpg"))
    shutil.copy(file, file.with_suffix(".heic"))
    code, out = verify("folder", folders, capsys)
    assert code == 0
    assert "left out  1 file by its name: 1 .heic\n" in out


def test_a_part_of_a_published_set_is_no_whole_copy(tmp_path, capsys):
    code, out = verify("aircraft", write_aircraft(tmp_path / "planes"), capsys)
    assert code == 1
    assert "has 3 classes, but FGVC-Aircraft has 100" in out


def test_a_folder_without_the_set_is_refused(tmp_path, capsys):
    assert main(["verify", "cub", "--data-root", str(tmp_path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_list_says_what_there_is_and_where(birds, tmp_path, capsys):
    assert main(["list", "--data-root", str(birds)]) == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert set(lines) == {"cub", "cars", "aircraft", "folder", "synthetic"}
    assert "200 classes, 5,994 + 5,794 images" in lines["cub"]
    assert f"in {birds}" in lines["cub"]
    assert "196 classes, 8,144 + 8,041" in lines["cars"]
    assert "100 classes, 6,667 + 3,333" in lines["aircraft"]
    assert "not found" in lines["aircraft"]
