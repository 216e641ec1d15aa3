"""The AN4 recipes, whole, at toy size, on the eight utterances of the sample."""

import hashlib
import tarfile

import pytest

from posinv.data.directory import DataDir


@pytest.fixture(scope="module")
def db(shared_data, checkout):
    """db.sh, where the sample is found."""
    for task in ("enh1", "ssft1"):
        path = checkout / "egs" / "an4" / task / "db.sh"
        path.unlink()
        path.write_text(f"AN4='{shared_data / 'an4_sample' / 'an4'}'\nNOISE_UNSEEN=\n")


SIZES = {"train": 4, "dev": 1, "test": 2}
TOY = ["--ssl_units", 10, "--asr_lrs", "", "--pr_lrs", ""]


def check_table(rows, systems, columns):
    """Check that each of the systems has a figure in each of the columns of the first table."""
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    header, table = cells[0], {row[0]: row[1:] for row in cells[2 : 2 + len(systems)]}
    assert list(table) == systems
    for name in columns:
        place = header.index(name) - 1
        # Marks of significance follow a figure. Heads of a few updates insert more than there is:
        # error rates may be above 100 %.
        assert all(float(figures[place].split()[0]) > 0 for figures in table.values())


@pytest.mark.full
def test_enh1(recipe, db):
    an4 = recipe("an4/enh1")
    done = an4.run(*TOY, "--criteria", "ssl_mse_pad ssl_xcorr", "--test_conditions", "clean seen")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "left out, without a transcript: 1 files: cen7-fash-b.sph" in done.stdout
    sets = {split: DataDir.read(an4.dir / "data" / split) for split in ("train", "dev", "test")}
    assert {split: len(data.wav) for split, data in sets.items()} == SIZES
    assert sets["test"].text["mmxg-cen8-b"] == "OCTOBER TWENTY FOUR NINETEEN SEVENTY"
    an4.check_stages(done.stdout, last=9)
    assert (an4.dir / "exp/RESULTS.md").read_text().startswith("# AN4: ")
    systems = ["noisy input", "before fine-tuning", "ssl_mse_pad", "ssl_xcorr"]
    check_table(an4.table(done.stdout), systems, ["test_clean", "test_seen"])


@pytest.mark.full
def test_ssft1(recipe, db):
    an4 = recipe("an4/ssft1")
    done = an4.run(*TOY, "--methods", "laser")
    assert done.returncode == 0, done.stdout + done.stderr
    an4.check_stages(done.stdout, last=7)
    check_table(an4.table(done.stdout), ["base", "laser"], ["PER test_clean", "WER test_clean"])


def test_tokens_of_the_training_set_alone_are_refused(recipe, db):
    """Five utterances don't have every letter: what token_sets is for."""
    an4 = recipe("an4/enh1")
    done = an4.run(
        *("--stage", 1, "--stop_stage", 3, "--token_sets", "", "--dumpdir", "dump other"),
        *("--test_conditions", "clean"),
    )
    assert done.returncode != 0
    assert "validate_data: error:" in done.stderr
    assert "unknown" in done.stderr


def test_the_corpus_is_downloaded_where_db_points_nowhere(recipe, shared_data, tmp_path):
    """From a file address; the whole corpus is packed as the sample is here."""
    an4 = recipe("an4/enh1")
    archive = tmp_path / "an4_sphere.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(shared_data / "an4_sample" / "an4", "an4")
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    only_data = ["--stop_stage", 1]

    def db(checksum):
        (an4.dir / "db.sh").unlink()
        (an4.dir / "db.sh").write_text(
            f"AN4=\nAN4_URL='file://{archive}'\nAN4_CHECKSUM={checksum}\n"
        )

    db(f"sha256:{'0' * 64}")
    done = an4.run(*only_data)
    assert done.returncode != 0
    assert "download: error: " in done.stderr
    db(f"sha256:{digest}")
    for _ in range(2):
        done = an4.run(*only_data)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "the whole corpus goes to downloads/an4" in done.stdout
    test = DataDir.read(an4.dir / "data" / "test")
    assert test.wav["mmxg-cen8-b"].startswith(str(an4.dir / "downloads" / "an4"))
