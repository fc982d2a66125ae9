#!/bin/bash
# Builds the programs that tests run, into a folder (default: target/programs):
#
#   racer          changes its buffers in flight and logs it (racer.c says more)
#   racer-static   the same without libraries: nothing can be preloaded into it
#   corners        odd uses of direct I/O, and what came of each
#   reader         reads into a buffer that changes
#   reuser         reads into a buffer that is being written
#
#   tests/programs/build.sh [OUT]
#
# Can be repeated at any time and by several tests at once; what is up to date
# is left alone. Ends with status 3, and says why, where something it needs is
# not installed.
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
out=${1:-$here/../../target/programs}

missing() {
    echo "programs: $1 is missing: apt-get install $2" >&2
    exit 3
}

have_header() {
    echo "#include <$1>" | gcc -E -x c - >/dev/null 2>&1
}

[ "$(uname -m)" = x86_64 ] || { echo "programs: they are built on x86-64 only" >&2; exit 3; }
command -v gcc >/dev/null || missing gcc gcc
command -v flock >/dev/null || missing flock util-linux
have_header stdio.h || missing stdio.h libc6-dev
have_header libaio.h || missing libaio.h libaio-dev
have_header liburing.h || missing liburing.h liburing-dev

mkdir -p "$out"
exec 9>"$out/lock"
flock 9

FLAGS=(-std=c11 -g -O2 -Wall -Wextra -Werror -pthread)
COMMON=(racer.c workers.c content.c mutator.c log.c sync.c uring.c)

# compile OUTPUT ARGUMENT...: if a source is newer. Whoever runs the old one keeps it.
compile() {
    local output=$1 input
    shift
    for input in "$here"/*.c "$here"/*.h "$here/build.sh"; do
        if [ ! "$out/$output" -nt "$input" ]; then
            (cd "$here" && gcc "${FLAGS[@]}" -o "$out/$output.new" "$@")
            mv "$out/$output.new" "$out/$output"
            return
        fi
    done
}

out=$(cd "$out" && pwd)
compile racer "${COMMON[@]}" libs.c -laio -luring
compile corners -std=gnu11 corners.c
compile reader reader.c
compile reuser reuser.c -laio
compile racer-static -DNO_LIBS -static "${COMMON[@]}"
