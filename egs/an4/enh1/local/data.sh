#!/usr/bin/env bash
# CMU AN4: data/{train,dev,test}. The corpus is where AN4 in db.sh says, or is downloaded. Options:
# those of posinv.bin.prepare_an4.
set -euo pipefail
. scripts/options.sh
. ./path.sh
. ./db.sh
if [ ! -d "${AN4:-}" ]; then
    log "AN4=${AN4:-} in db.sh: no such folder: the whole corpus goes to downloads/an4"
    AN4=downloads/an4
    python3 -m posinv.bin.download --url "$AN4_URL" --checksum "$AN4_CHECKSUM" \
        --out downloads/an4_sphere.tar.gz --extract downloads
fi
python3 -m posinv.bin.prepare_an4 --an4 "$AN4" --out data "$@"
