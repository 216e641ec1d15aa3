# Options of a script, and its messages. Source it after `set -euo pipefail`.
# shellcheck shell=bash

log() { echo "$(date '+%H:%M:%S') $*"; }
die() { echo "error: $*" >&2; exit 1; }

# require FILE WHAT: end with an error unless FILE exists.
require() {
    [ -e "$1" ] || die "$1: not found: $2"
}

# into FILE COMMAND [ARG ...]: write the output of COMMAND to FILE, atomically.
into() {
    local file=$1
    shift
    "$@" > "$file.partial" || { rm -f "$file.partial"; return 1; }
    mv -f "$file.partial" "$file"
}

# opt NAME DEFAULT HELP [CHECK [ARG ...]]: declare the option --NAME; $NAME holds its value. CHECK is
# one of those in check_option.
declare -A _opt_help=() _opt_check=()
_opt_names=()
opt() {
    local _name=$1
    _opt_names+=("$_name")
    _opt_help[$_name]=$3
    printf -v "$_name" '%s' "$2"
    shift 3
    _opt_check[$_name]=$*
}

# check_option NAME VALUE [CHECK [ARG ...]]
check_option() {
    local option="--$1 $2" value=$2 check=${3:-} words word
    shift $(($# < 3 ? $# : 3))
    read -ra words <<< "$value"
    case $check in
        integer) [[ $value =~ ^[0-9]+$ ]] || die "$option: must be a whole number" ;;
        positive) [[ $value =~ ^0*[1-9][0-9]*$ ]] || die "$option: must be a whole number above 0" ;;
        integers)
            [ -n "${words[*]}" ] || die "$option: must be whole numbers"
            for word in "${words[@]}"; do
                [[ $word =~ ^[0-9]+$ ]] || die "$option: $word is not a whole number"
            done
            ;;
        numbers)
            for word in "${words[@]}"; do
                [[ $word =~ ^[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?$ ]] \
                    || die "$option: $word is not a number"
            done
            ;;
        stage)
            [[ $value =~ ^0*[1-9][0-9]*$ ]] || die "$option: must be the number of a stage, 1 to $1"
            [ "$value" -le "$1" ] || die "$option: the last stage is $1"
            ;;
        one_of) [[ $value != *" "* && " $* " == *" ${value:-?} "* ]] || die "$option: must be one of: $*" ;;
        some_of)
            for word in "${words[@]}"; do
                [[ " $* " == *" $word "* ]] || die "$option: there is no $word; there are: $*"
            done
            ;;
        yaml_in)
            for word in "${words[@]}"; do
                require "$1/$word.yaml" "the configuration of $option"
            done
            ;;
        file) [ -z "$value" ] || [ -e "$value" ] || die "$option: no such file" ;;
    esac
}

# Prints each option's present value as its default: the choices of a recipe's run.sh come first.
print_options() {
    local _name _choices
    for _name in "${_opt_names[@]}"; do
        _choices=
        case ${_opt_check[$_name]} in
            one_of\ *) _choices=": one of ${_opt_check[$_name]#* }" ;;
            some_of\ *) _choices=": of ${_opt_check[$_name]#* }" ;;
        esac
        printf '  --%-22s %s%s (default: %s)\n' "$_name" "${_opt_help[$_name]}" "$_choices" "${!_name:-none}"
    done
    printf '  --%-22s %s\n' config "YAML file of options, name: value" help "print this and exit"
}

_set_option() {  # _set_option NAME VALUE WHERE
    [ -n "${_opt_help[$1]+set}" ] || die "$3: unknown option --$1; --help lists the options"
    printf -v "$1" '%s' "$2"
}

# parse_options "$@": set the options that opt declared, and check them. --name value, --name=value;
# - and _ in a name are the same. A later value replaces an earlier one; the options in
# --config FILE.yaml count at the place where --config stands.
parse_options() {
    local _name _value _file _pairs _key  # an option may be called "name"
    while [ $# -gt 0 ]; do
        case $1 in
            --help | -h)
                echo "Usage: ${0##*/} [options]"
                print_options
                exit 0
                ;;
            --*=*)
                _name=${1%%=*}
                _value=${1#*=}
                shift
                ;;
            --*)
                _name=$1
                [ $# -ge 2 ] || die "option $_name needs a value"
                _value=$2
                shift 2
                ;;
            *) die "unexpected argument: $1; options look like --name value" ;;
        esac
        _name=${_name#--}
        _name=${_name//-/_}
        if [ "$_name" = config ]; then
            _file=$_value
            _pairs=$(mktemp)
            (. ./path.sh >&2 && python3 -m posinv.bin.recipe_options "$_file") > "$_pairs" || { rm -f "$_pairs"; exit 1; }
            while IFS= read -r -d '' _key && IFS= read -r -d '' _value; do
                # A file may come from others: what program runs is for the command line.
                [ "$_key" != python ] || die "$_file: python: not from a file: give --python $_value"
                _set_option "${_key//-/_}" "$_value" "$_file"
            done < "$_pairs"
            rm -f "$_pairs"
        else
            _set_option "$_name" "$_value" "${0##*/}"
        fi
    done
    for _name in "${_opt_names[@]}"; do
        # shellcheck disable=SC2086  # a check and its arguments
        check_option "$_name" "${!_name}" ${_opt_check[$_name]}
    done
}
