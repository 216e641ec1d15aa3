#!/usr/bin/env bash
# Join the digits into utterances: data/{train,dev,test}. Options: those of
# posinv.bin.prepare_fsdd.
set -euo pipefail
. scripts/options.sh
. ./path.sh
. ./db.sh
[ -d "${FSDD:-}/recordings" ] || die "FSDD=${FSDD:-} in db.sh: no folder 'recordings' in it; point FSDD at a copy of the Free Spoken Digit Dataset"
python3 -m posinv.bin.prepare_fsdd --recordings "$FSDD/recordings" --out data "$@"
