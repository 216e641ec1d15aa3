"""Check posinv's environment: one line for each thing that is right or wrong, and what to do.

tools/setup.sh runs it at its end. Please put its output into bug reports.
"""

import argparse
import csv
import importlib.util
import locale
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MAIN = ("torch", "torchaudio", "espnet", "transformers", "numpy", "numba")
FORMATS = {"WAV": "WAV", "FLAC": "FLAC", "MP3": "MP3", "OGG": "OGG", "NIST": "SPHERE"}
# GB of disk and of memory that a recipe needs, besides the environment; memory without a GPU.
RECIPES = {
    "egs/mini, egs/fsdd, egs/an4": (2, 4),
    "egs/librispeech/ssft1": (25, 16),
    "egs/librispeech_demand/enh1": (50, 16),
}
OK, NOTE, BAD = "ok", "note", "bad"
MARKS = {OK: ("✓", "ok  "), NOTE: ("·", "note"), BAD: ("✗", "BAD ")}
REPAIR = "run tools/setup.sh"

Line = tuple[str, str]  # OK, NOTE or BAD; the text


def canonical(name: str) -> str:
    """Return a distribution's name in the form of package indexes."""
    return re.sub(r"[-_.]+", "-", name).lower()


def distributions() -> Iterator[tuple[str, Path, metadata.Distribution]]:
    """Yield pip's and uv's packages in this environment: name, metadata's folder, metadata."""
    folders = {sysconfig.get_path(name) for name in ("purelib", "platlib")}
    for path in sorted(path for folder in folders for path in Path(folder).glob("*.dist-info")):
        found = metadata.Distribution.at(path)
        # An installation that was killed may not have written the installer's name.
        if (found.read_text("INSTALLER") or "").strip() in ("pip", "uv", ""):
            yield canonical(path.name.split("-")[0]), path, found


def damage(found: metadata.Distribution) -> str | None:
    """Return a distribution's first file that is gone or has another size, None without such."""
    record = found.read_text("RECORD")
    if record is None or found.read_text("METADATA") is None:
        return "its metadata"
    base = str(found.locate_file(""))
    for name, _, size in csv.reader(record.splitlines()):
        try:
            if size and os.stat(os.path.join(base, name)).st_size != int(size):  # noqa: PTH116, PTH118
                return name
        except OSError:
            return name
    return None


def packages() -> Iterator[str]:
    """Yield one line for each installed package: name and version, source, and what is damaged."""
    for _, path, found in distributions():
        origin = found.read_text("direct_url.json") or ""
        broken = damage(found)
        state = f"damaged: {broken}" if broken else ""
        yield " ".join([path.stem, origin, state]).rstrip()


def forget_damaged() -> Iterator[str]:
    """Remove the metadata of damaged packages, and yield their names."""
    for name, path, found in distributions():
        if damage(found):
            shutil.rmtree(path)
            yield name


def tested_versions() -> dict[str, str]:
    """Return the version of each package in tools/constraints.txt."""
    text = (ROOT / "tools" / "constraints.txt").read_text(encoding="utf-8")
    return dict(re.findall(r"^([\w.-]+)==([^\s;]+)", text, re.MULTILINE))


def check_python() -> Iterator[Line]:
    """Name the interpreter and the machine."""
    system = f"{platform.system()} {platform.machine()}, {os.cpu_count()} processors"
    yield OK, f"Python {platform.python_version()} ({sys.executable}), {system}"


def check_packages() -> Iterator[Line]:
    """Compare versions with the tested ones, and look for damaged packages."""
    tested = tested_versions()
    found = {name: path.stem.split("-")[1] for name, path, _ in distributions()}
    others = []
    for name, version in tested.items():
        if name not in found:
            if name in MAIN:
                yield BAD, f"{name} is not installed: {REPAIR}"
        elif found[name].split("+")[0] == version:
            if name in MAIN:
                yield OK, f"{name} {found[name]}, as tested"
        elif name in MAIN:
            yield NOTE, f"{name} {found[name]}; tested with {version}"
        else:
            others.append(f"{name} {found[name]} (tested: {version})")
    if others:
        yield NOTE, f"other packages that differ from the tested ones: {', '.join(others)}"
    broken = [f"{name} ({file})" for name, _, d in distributions() if (file := damage(d))]
    if broken:
        yield BAD, f"packages with files gone or changed: {', '.join(broken)}: {REPAIR}"
    else:
        yield OK, f"{len(found)} packages, all files in place"


def check_torchaudio() -> Iterator[Line]:
    """Check that torchaudio's compiled part fits torch's build."""
    try:
        import torchaudio  # noqa: F401
    except ImportError as error:
        yield BAD, f"torchaudio cannot be imported ({error}): {REPAIR}"
    except (OSError, RuntimeError) as error:
        import torch

        reason = " ".join(str(error).split())
        build = f"cu{torch.version.cuda.replace('.', '')}" if torch.version.cuda else "cpu"
        yield (
            BAD,
            f"torchaudio is for another build of torch than {torch.__version__} ({reason}): run "
            f"tools/setup.sh --clean --torch-backend {build}; in an environment of your own, "
            f"uv pip install --torch-backend {build} --reinstall-package torchaudio torchaudio",
        )


def check_codecs() -> Iterator[Line]:
    """List the kinds of audio files that can be read."""
    try:
        import soundfile
    except (ImportError, OSError) as error:
        yield BAD, f"soundfile cannot be imported ({error}): {REPAIR}"
        return
    known = soundfile.available_formats()
    have = [name for key, name in FORMATS.items() if key in known]
    lack = [name for key, name in FORMATS.items() if key not in known]
    version = soundfile.__libsndfile_version__
    yield OK, f"audio files (libsndfile {version}): {', '.join(have)}"
    if lack:
        yield (
            NOTE,
            f"no {', '.join(lack)}: the system's libsndfile is old; install a newer one, or "
            "convert such files",
        )


def agrees(backend: str, device: str) -> bool:
    """Return whether a back end of soft-DTW gives the reference's values and gradients."""
    import torch

    from posinv.softdtw import soft_dtw

    results = []
    for name, place in (("reference", "cpu"), (backend, device)):
        cost = torch.rand(2, 40, 37, generator=torch.Generator().manual_seed(0))
        cost = cost.to(place).requires_grad_()
        lengths = torch.tensor([40, 31]), torch.tensor([37, 29])
        value = soft_dtw(cost, *lengths, gamma=0.1, backend=name)
        value.sum().backward()
        results.append((value.detach().cpu(), cost.grad.cpu()))
    return all(torch.allclose(a, b, rtol=1e-3, atol=1e-4) for a, b in zip(*results, strict=True))


def check_backend(backend: str, device: str, name: str) -> Iterator[Line]:
    """Compare a back end of soft-DTW with the reference."""
    started = time.perf_counter()
    try:
        right = agrees(backend, device)
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        yield (
            BAD,
            f"soft-DTW on {name} fails ({reason}): {REPAIR}; if that does not help, report it",
        )
        return
    seconds = time.perf_counter() - started
    if right:
        yield (
            OK,
            f"soft-DTW on {name} agrees with the reference ({seconds:.0f} s, compiling included)",
        )
    else:
        yield BAD, f"soft-DTW on {name} disagrees with the reference: report it, with these lines"


def check_softdtw() -> Iterator[Line]:
    """Check soft-DTW's compiled code on the CPU and on each GPU."""
    if importlib.util.find_spec("torch") is None:
        return  # check_packages reports it
    import torch

    yield from check_backend("cpu", "cpu", "the CPU")
    for number in range(torch.cuda.device_count()):
        free, total = (size / 2**30 for size in torch.cuda.mem_get_info(number))
        name = f"GPU {number}, {torch.cuda.get_device_name(number)}"
        yield OK, f"{name}: {free:.0f} of {total:.0f} GiB free"
        yield from check_backend("cuda", f"cuda:{number}", f"GPU {number}")
    if torch.cuda.device_count():
        return
    cards = []
    if shutil.which("nvidia-smi"):
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True)
        cards = listed.stdout.splitlines() if listed.returncode == 0 else []
    if not cards:
        yield NOTE, "no GPU: everything runs on the CPU"
    elif torch.version.cuda is None:
        yield (
            BAD,
            f"{cards[0]} is not used: torch is a build for CPUs: run "
            "tools/setup.sh --clean --torch-backend auto",
        )
    else:
        yield (
            BAD,
            f"{cards[0]} is not used: torch is for CUDA {torch.version.cuda}, which the driver may "
            "be too old for: update it, or run tools/setup.sh --clean --torch-backend auto",
        )


def check_pesq() -> Iterator[Line]:
    """Check that PESQ is installed."""
    if importlib.util.find_spec("pesq"):
        yield OK, "PESQ"
    else:
        yield (
            NOTE,
            "no PESQ: tables have no PESQ column; install a C compiler and Python's headers, then: "
            f"{sys.executable} -m pip install -c tools/constraints.txt pesq",
        )


def check_dnsmos() -> Iterator[Line]:
    """Check that DNSMOS is installed."""
    if importlib.util.find_spec("speechmos") and importlib.util.find_spec("onnxruntime"):
        yield OK, "DNSMOS"
    else:
        yield (
            NOTE,
            "no DNSMOS: tables have no figures of it; to have it (3 s of speech take a core 2 s): "
            f"{sys.executable} -m pip install -c tools/constraints.txt speechmos onnxruntime "
            "requests",
        )


def free_memory() -> float | None:
    """Return the GB of memory that a program can get; None if it is unknown."""
    try:
        text = Path("/proc/meminfo").read_text(encoding="ascii")
    except OSError:
        return None
    sizes = [int(re.search(r"MemAvailable:\s+(\d+)", text)[1]) * 1024]
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.exists() and (text := limit.read_text(encoding="ascii").strip()).isdigit():
        used = Path("/sys/fs/cgroup/memory.current").read_text(encoding="ascii")
        sizes.append(int(text) - int(used))
    return min(sizes) / 1e9


def check_space() -> Iterator[Line]:
    """Compare the disk space and memory that each recipe needs with what is free."""
    disk = shutil.disk_usage(ROOT).free / 1e9
    memory = free_memory()
    free = f"free: {disk:.0f} GB" + ("" if memory is None else f", {memory:.0f} GB")
    for recipe, (gigabytes, wanted) in RECIPES.items():
        enough = disk >= gigabytes and (memory is None or memory >= wanted)
        yield (
            OK if enough else NOTE,
            f"{recipe}: about {gigabytes} GB of disk, {wanted} GB of memory ({free})",
        )


CHECKS = (
    check_python,
    check_packages,
    check_torchaudio,
    check_codecs,
    check_softdtw,
    check_pesq,
    check_dnsmos,
    check_space,
)


def main() -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name, use in (
        ("--packages", "only list the installed packages, and their damage"),
        ("--forget-damaged", "only remove the metadata of damaged packages, and list these"),
    ):
        parser.add_argument(name, action="store_true", help=f"{use} (for tools/setup.sh)")
    args = parser.parse_args()
    if args.packages or args.forget_damaged:
        for line in packages() if args.packages else forget_damaged():
            print(line)
        return 0
    # Under LC_ALL=C, Python writes UTF-8, but the terminal may not show it.
    plain = "utf" not in locale.getencoding().lower()
    if plain:
        sys.stdout.reconfigure(errors="backslashreplace")
    worst = 0
    for check in CHECKS:
        try:
            for state, text in check():
                print(MARKS[state][plain], text, flush=True)
                worst |= state == BAD
        except Exception as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            print(MARKS[BAD][plain], f"{check.__name__}: {reason}: {REPAIR}", flush=True)
            worst = 1
    return worst


if __name__ == "__main__":
    sys.exit(main())
