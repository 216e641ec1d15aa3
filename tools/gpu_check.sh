#!/usr/bin/env bash
# All that needs a GPU, by one command: the CUDA tests, and the speed of soft-DTW and of LASER.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

parts=(tests softdtw hubert-float32 hubert-bf16 wavlm-float32 wavlm-bf16 enh)

usage() {
    cat <<END
Usage: tools/gpu_check.sh [--python PATH] [--out DIR] [--device cpu] [PART...]
Parts, all without PART: ${parts[*]}
  tests      the tests that skip where there is no GPU
  softdtw    tools/bench_softdtw.py: soft-DTW, beside the other implementations that are installed
  MODEL-TYPE tools/bench_ssft.py: 300 updates of LASER from FLAC files, HuBERT-Base or WavLM-Base,
             float32 or bfloat16: time of each phase, of 3,600 updates, memory, the largest batch
  enh        tools/bench_enh.py: updates of SE fine-tuning
A part takes 1 to 8 minutes, all less than 25. What it prints is in DIR/PART.txt, its tables are
beside it; DIR is tools/results/<machine's name>. A part that has such a file is done: remove the
file to run the part again. A part that fails leaves DIR/PART.failed.txt; the others go on.
--device cpu runs all parts at toy size without a GPU, to test this script.
The Python is --python, tools/venv's, or python3. It needs PyTorch for CUDA 13 with cuda-bindings,
torchaudio, transformers, numba, matplotlib, pyyaml, soundfile, soxr and kaldiio, and pytest and
hypothesis for the tests. What needs ESPnet (enh, some tests) or librosa (LASER's authors' way) is
left out where these are not installed. tools/setup.sh installs all but the other implementations
of soft-DTW: pip install pysdtw tslearn dtw-loss-functions.
END
}
die() { echo "gpu_check: error: $*" >&2; exit 1; }

device=cuda out='' python='' chosen=()
while [ $# -gt 0 ]; do
    case $1 in
        -h | --help) usage; exit ;;
        --python | --out | --device)
            [ $# -gt 1 ] || die "$1 needs a value: see --help"
            declare "${1#--}=$2"; shift 2 ;;
        *)
            [[ " ${parts[*]} " == *" $1 "* ]] || die "no part $1: parts are ${parts[*]}"
            chosen+=("$1"); shift ;;
    esac
done
case $device in cuda | cpu) ;; *) die "--device must be cuda or cpu, got $device" ;; esac
if [ -z "$python" ]; then
    python=tools/venv/bin/python
    [ -x "$python" ] || python=python3
fi
"$python" -c 'import torch' 2> /dev/null || die "$python has no PyTorch: give another by --python"
if ! machine=$("$python" -c '
import re, sys, torch
if sys.argv[1] == "cuda" and not torch.cuda.is_available():
    sys.exit(1)
name = torch.cuda.get_device_name() if sys.argv[1] == "cuda" else "cpu-stand-in"
print(re.sub("[^a-z0-9]+", "-", name.lower()).strip("-"))' "$device"); then
    die "torch sees no GPU: $python tools/check_install.py says why; --device cpu tests this script"
fi
out=${out:-tools/results/$machine}
mkdir -p "$out"
out=$(realpath "$out")
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1

has() { "$python" -c "import importlib.util, sys; sys.exit(not importlib.util.find_spec('$1'))"; }

bench() {
    local script=$1
    shift
    [ "$device" = cuda ] || set -- --quick "$@"
    "$python" "tools/bench_$script.py" --device "$device" --out "$out" "$@"
}

run_tests() {
    local tests=(test/posinv/softdtw test/posinv/augment test/posinv/models/test_ssft.py)
    ! has espnet2 || tests+=(test/posinv/espnet/test_criteria.py test/posinv/espnet/test_frontends.py
        test/posinv/inference/test_enhancer.py)
    [ "$device" = cuda ] || tests=(test/posinv/softdtw/test_cuda.py)
    "$python" -m pytest -q -rs -p no:cacheprovider -k 'device or cuda or gpu' "${tests[@]}"
}

ssft() {
    local model=${1%-*} options=()
    [ "${1#*-}" = float32 ] || options=(--bf16)
    [ "$device" = cuda ] || options+=(--seconds 1 --updates 3)
    bench ssft --model "$model" "${options[@]}"
}

run_part() {
    case $1 in
        tests) run_tests ;;
        softdtw) bench softdtw ;;
        enh)
            if ! has espnet2; then echo "left out: ESPnet is not installed"; return; fi
            if [ "$device" = cuda ]; then bench enh --utterances 8 --updates 10 --turns 3
            else bench enh --seconds 0.5; fi ;;
        *) ssft "$1" ;;
    esac
}

failed=()
[ ${#chosen[@]} -gt 0 ] || chosen=("${parts[@]}")
for part in "${chosen[@]}"; do
    file=$out/$part.txt
    if [ -e "$file" ]; then
        echo "gpu_check: $part: done before, $file"
        continue
    fi
    echo "gpu_check: $part: started $(date -u +%H:%M:%S) UTC"
    SECONDS=0
    status=0
    # set -e does not hold in a condition, so the part is a process of its own.
    (
        set -e
        echo "gpu_check.sh $part on $machine, $(date -u '+%F %H:%M') UTC, commit" \
            "$(git rev-parse --short HEAD 2> /dev/null || echo unknown)"
        run_part "$part"
    ) > "$out/$part.failed.txt" 2>&1 &
    wait $! || status=$?
    if [ $status = 0 ]; then
        echo "gpu_check.sh: $part took $SECONDS s" >> "$out/$part.failed.txt"
        mv "$out/$part.failed.txt" "$file"
        echo "gpu_check: $part: $SECONDS s, $file"
    else
        failed+=("$part")
        tail -n 5 "$out/$part.failed.txt" >&2
        echo "gpu_check: $part: failed after $SECONDS s, $out/$part.failed.txt" >&2
    fi
done
[ ${#failed[@]} = 0 ] || die "failed: ${failed[*]}"
