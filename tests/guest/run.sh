#!/bin/bash
# Boots the guest on a disk that a vhost-user-blk server exports, in QEMU
# without KVM, and shows its serial console.
#
#   tests/guest/run.sh SOCKET OUT [options]
#
#   SOCKET           the server's socket
#   OUT              what build.sh built (built here if it is not there)
#   --boot           boot the disk itself by its boot sector (boot.S) instead of
#                    Linux; the disk must begin with OUT/boot.img
#   --prefilled      the host wrote seed 7 at 48 MiB (see init.c): compare it
#   --queues N       virtqueues, and CPUs of the guest (default 2)
#   --timeout S      seconds until it is given up (default 180)
#   --log FILE       a copy of the console there
#   --append WORDS   more words for the kernel's command line
#
# Exit: 0 the guest says that all is well; 1 it says that something is not, or
# died without a word; 2 it could not be started; 124 timeout.
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
usage() {
    sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "$0"
}

die() {
    echo "guest: $*" >&2
    exit 2
}

boot=no prefilled='' queues=2 limit=180 log=/dev/null append='' words=()
while [ $# -gt 0 ]; do
    case $1 in
    --boot) boot=yes ;;
    --prefilled) prefilled=guest.prefilled ;;
    --queues | --timeout | --log | --append)
        [ $# -ge 2 ] || die "$1 needs a value"
        case $1 in
        --queues) queues=$2 ;;
        --timeout) limit=$2 ;;
        --log) log=$2 ;;
        --append) append=$2 ;;
        esac
        shift
        ;;
    -h | --help)
        usage
        exit 0
        ;;
    -*) die "unknown option $1 (--help)" ;;
    *) words+=("$1") ;;
    esac
    shift
done
[ ${#words[@]} = 2 ] || { usage >&2; exit 2; }
socket=${words[0]} out=${words[1]}

command -v qemu-system-x86_64 >/dev/null ||
    die "qemu-system-x86_64 is missing: apt-get install qemu-system-x86"
[ -S "$socket" ] || die "$socket is not a socket"
"$here/build.sh" "$out" >&2 || exit 2

# Guest memory is shared: the server maps it, and reads it while the guest
# writes it. The old `pc` machine has fewer devices to look for than `q35`.
qemu=(
    qemu-system-x86_64
    -machine pc,memory-backend=memory,hpet=off
    -accel tcg,thread=multi -cpu max -smp "$queues"
    -m 256M -object memory-backend-memfd,id=memory,size=256M,share=on
    -nodefaults -display none -no-user-config -no-reboot
    -serial stdio -monitor none
    -chardev "socket,id=disk,path=$socket"
    -device "vhost-user-blk-pci,chardev=disk,num-queues=$queues$([ "$boot" = no ] || echo ,bootindex=0)"
)
if [ "$boot" = yes ]; then
    qemu+=(-device "isa-debug-exit,iobase=0xf4,iosize=0x04")
else
    qemu+=(
        -kernel "$out/vmlinuz" -initrd "$out/initrd"
        -append "console=ttyS0 loglevel=4 panic=-1 nokaslr mitigations=off tsc=reliable no_timer_check $prefilled $append"
    )
fi

console=$(mktemp)
trap 'rm -f "$console"' EXIT
status=0
timeout --kill-after=5 "$limit" "${qemu[@]}" </dev/null 2>&1 | tr -d '\r' | tee "$console" || status=${PIPESTATUS[0]}
cp "$console" "$log" 2>/dev/null || [ "$log" = /dev/null ] || die "can not write $log"

if [ "$status" = 124 ] || [ "$status" = 137 ]; then
    echo "guest: no end after $limit seconds" >&2
    exit 124
fi
if [ "$boot" = yes ]; then
    # The boot sector leaves through isa-debug-exit: (0x10 << 1) | 1.
    grep -q '^BOOT OK$' "$console" && [ "$status" = 33 ] && exit 0
else
    grep -q '^GUEST OK$' "$console" && [ "$status" = 0 ] && exit 0
fi
echo "guest: failed (QEMU ended with $status)" >&2
exit 1
