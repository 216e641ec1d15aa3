#!/usr/bin/env bash
# LibriSpeech's train-clean-100, dev-clean and test-clean: data/{train,dev,test}. Corpora are where
# db.sh says, or are downloaded. Query-by-example search is QUESST 2014's, with --quesst14 true.
# shellcheck disable=SC2154  # opt assigns the options
set -euo pipefail
. scripts/options.sh
opt demand false "DEMAND's noises, too: data/demand/{seen,unseen}" one_of true false
opt master64 false "the released DEMUCS, too: data/master64.th" one_of true false
opt quesst14 false "QUESST 2014, too, for --qbe true: data/quesst14_{dev,eval}" one_of true false
opt nj 2 "processes" positive
parse_options "$@"
. ./path.sh
. ./db.sh
checksums=${CHECKSUMS:-local/checksums.txt}
require "$checksums" "CHECKSUMS in db.sh must name a list like local/checksums.txt"

fetch() {  # fetch FILE URL [ARG ...]: $DOWNLOADS/FILE from URL/FILE
    local file=$1 url=$2 sum
    shift 2
    sum=$(awk -v file="$file" '$1 == file { print $2 }' "$checksums")
    if [ "${sum:=unverified}" = unverified ]; then
        log "$file: $checksums has no checksum of it: it is taken as it comes"
    fi
    set -- "$@" --checksum "$sum"
    python3 -m posinv.bin.download --url "$url/$file" --out "$DOWNLOADS/$file" "$@"
}

# ------------------------------------------------------------------------------ LibriSpeech
subsets=(train:train-clean-100 dev:dev-clean test:test-clean)
if [ -z "${LIBRISPEECH:-}" ]; then
    for entry in "${subsets[@]}"; do
        fetch "${entry#*:}.tar.gz" "$LIBRISPEECH_URL" --extract "$DOWNLOADS"
    done
    LIBRISPEECH=$DOWNLOADS/LibriSpeech
fi
lexicons=("${LIBRISPEECH_LEXICON[@]}")
if [ -z "${lexicons[*]}" ]; then
    lexicons=()
    # SUPERB's, which S3PRL publishes: 200,000 words, and the corpus's others.
    for file in librispeech-lexicon-200k-g2p.txt librispeech-lexicon-allothers-g2p.txt; do
        fetch "$file" "$LIBRISPEECH_LEXICON_URL"
        lexicons+=("$DOWNLOADS/$file")
    done
fi
for entry in "${subsets[@]}"; do
    IFS=: read -r set subset <<< "$entry"
    require "$LIBRISPEECH/$subset" "LIBRISPEECH in db.sh must be the folder with train-clean-100, dev-clean and test-clean; empty: they are downloaded"
    python3 -m posinv.bin.prepare_librispeech --librispeech "$LIBRISPEECH" \
        --lexicon "${lexicons[@]}" --subset "$subset" --out "data/$set" --nj "$nj"
done

# ----------------------------------------------------------------- DEMAND, the released DEMUCS
if [ "$demand" = true ]; then
    if [ -z "${DEMAND:-}" ]; then
        # SCAFE is not there at 16 kHz.
        for name in {DKITCHEN,DLIVING,DWASHING,NFIELD,NPARK,NRIVER,OHALLWAY,OMEETING,OOFFICE}_16k \
            {PCAFETER,PRESTO,PSTATION,SPSQUARE,STRAFFIC,TBUS,TCAR,TMETRO}_16k SCAFE_48k; do
            fetch "$name.zip" "$DEMAND_URL" --extract "$DOWNLOADS/DEMAND"
        done
        DEMAND=$DOWNLOADS/DEMAND
    fi
    python3 -m posinv.bin.prepare_demand --demand "$DEMAND" --out data/demand
fi
if [ "$master64" = true ]; then
    if [ -z "${MASTER64:-}" ]; then
        fetch master64-8a5dfb4bb92753dd.th "$MASTER64_URL"
        MASTER64=$DOWNLOADS/master64-8a5dfb4bb92753dd.th
    fi
    require "$MASTER64" "MASTER64 in db.sh must be the file of the released model; empty: it is downloaded"
    ln -sfn "$(realpath "$MASTER64")" data/master64.th
fi

# ------------------------------------------------------------------------------ QUESST 2014
if [ "$quesst14" = true ]; then
    if [ -z "${QUESST14:-}" ]; then
        fetch quesst14Database.tgz "$QUESST14_URL" --extract "$DOWNLOADS"
        QUESST14=$DOWNLOADS/quesst14Database
    fi
    require "$QUESST14/scoring" "QUESST14 in db.sh must be the folder quesst14Database; empty: it is downloaded"
    for split in dev eval; do
        python3 -m posinv.bin.prepare_quesst14 --quesst14 "$QUESST14" --split "$split" \
            --out "data/quesst14_$split" --nj "$nj"
    done
fi
