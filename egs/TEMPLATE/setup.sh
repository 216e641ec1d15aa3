#!/usr/bin/env bash
# Make a recipe for a new corpus. egs/README.md tells what to fill in.
set -euo pipefail
template=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)  # of the task: called by its link there
task=$(basename "$template")
egs=$(cd "$template/../.." && pwd)

die() { echo "error: $*" >&2; exit 1; }
[ -L "${BASH_SOURCE[0]}" ] && [ $# -eq 1 ] && [ "$1" != --help ] || {
    echo "Usage: egs/TEMPLATE/<task>/setup.sh egs/<corpus>/<name>, such as"
    echo "       egs/TEMPLATE/enh1/setup.sh egs/my_corpus/enh1"
    echo "What is there already is left as it is."
    [ "${1:-}" = --help ] && exit 0 || exit 1
}
recipe=$(realpath -m "$1")
name=$(basename "$recipe")
corpus=$(basename "$(dirname "$recipe")")
[ "$(dirname "$(dirname "$recipe")")" = "$(realpath "$egs")" ] && [ "$corpus" != TEMPLATE ] \
    || die "$1: must be egs/<corpus>/<name> in $(dirname "$egs")"
[[ $corpus/$name =~ ^[A-Za-z0-9_./-]+$ ]] || die "$1: only letters, digits and _ . - in names"

absent() { [ ! -e "$1" ] && [ ! -L "$1" ]; }
link() {  # link TARGET NAME
    if absent "$2"; then
        ln -s "$1" "$2"
    fi
}

mkdir -p "$recipe"
cd "$recipe"
for file in cmd.sh db.sh path.sh scripts; do
    link "../../TEMPLATE/$file" "$file"
done
for script in "$template"/*.sh; do
    file=$(basename "$script")
    case $file in setup.sh | run.sh) ;; *) link "../../TEMPLATE/$task/$file" "$file" ;; esac
done
link ../../../conf/small conf
if absent run.sh; then
    sed "s|CORPUS|$corpus|g; s|NAME|$name|g" "$template/run.sh" > run.sh
    chmod +x run.sh
fi
if absent local; then
    for sibling in ../*/local; do
        if [ -d "$sibling" ] && [ ! -L "$sibling" ]; then
            ln -s "$sibling" local
            echo "local/ is $sibling"
            break
        fi
    done
fi
if absent local; then
    mkdir local
    cp "$egs/TEMPLATE/local/data.sh" local/data.sh
fi
echo "$1: ready. Now fill in local/data.sh (what it must leave in data/ is written there), db.sh"
echo "(where the corpus is) and run.sh (the choices); then run $1/run.sh."
