#!/usr/bin/env bash
# Fill in: make data/train, data/dev and data/test, which share no speaker. Each has these lists:
#
#   wav.scp   <utterance> <audio>      a file (WAV, FLAC, OGG, SPHERE), a place in a Kaldi archive
#                                      (x.ark:123), or a command that writes audio, ending in |
#   text      <utterance> <words>
#   phn       <utterance> <phonemes>   separated by spaces
#   utt2spk   <utterance> <speaker>    an utterance's id begins with its speaker's
#   spk1.scp  <utterance> <audio>      clean reference; leave it out where the speech is clean
#
# sorted by utterance (LC_ALL=C sort), audio of one channel at 16 kHz (run.sh: --resample true for
# other rates). Where the corpus is comes from db.sh. posinv.corpora.lexicon makes phn of text;
# posinv/corpora/an4.py with egs/an4/enh1/local/data.sh is a short example.
#
# As it stands, this imports what you have, Kaldi directories or Lhotse cuts, and leaves data/train,
# data/dev and data/test alone where they are there already.
# shellcheck disable=SC2154  # opt assigns the options
set -euo pipefail
. scripts/options.sh
opt train "" "training set: a Kaldi directory, or Lhotse's cuts.jsonl.gz"
opt dev "" "validation set"
opt test "" "test set"
opt lexicon "" "pronunciation lexicon, for sets without phn"
opt g2p false "predict the (English) words that it lacks (true), or refuse them (false)" one_of true false
opt wav_root . "where relative paths of audio start"
opt channel "" "channel of stereo recordings and MultiCuts, 1 for the first, 0 for their mean; empty: they have one"
opt allow_pipes false "run the commands in wav.scp (true), or refuse them (false)" one_of true false
parse_options "$@"
. ./path.sh

opts=(--wav_root "$wav_root")
[ -z "$channel" ] || opts+=(--channel "$channel")
[ -z "$lexicon" ] || opts+=(--lexicon "$lexicon")
[ "$g2p" = false ] || opts+=(--g2p)
[ "$allow_pipes" = false ] || opts+=(--allow_pipes)
for set in train dev test; do
    if [ -n "${!set}" ]; then
        python3 -m posinv.bin.import_data --src "${!set}" --out "data/$set" "${opts[@]}"
    elif [ -d "data/$set" ]; then
        log "data/$set: there already, used as it is"
    else
        die "no data/$set: fill in local/data.sh, or say where there is one: --local_data_opts \"--$set DIR\" (a Kaldi directory or Lhotse's cuts.jsonl.gz)"
    fi
done
