#!/usr/bin/env bash
# LibriSpeech, DEMAND and the released DEMUCS: data/{train,dev,test,demand} and data/master64.th.
set -euo pipefail
exec ../../librispeech/ssft1/local/data.sh --demand true --master64 true "$@"
