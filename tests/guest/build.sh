#!/bin/bash
# Builds what run.sh boots, into a folder (default: target/guest):
#
#   vmlinuz    Debian's kernel, taken out of its package, not installed
#   initrd     an archive with init.c as PID 1 and the virtio modules
#   boot.img   1 KiB for the start of a disk: boot.S and the sector it reads
#
#   tests/guest/build.sh [OUT]
#
# Can be repeated at any time and by several tests at once; the kernel is
# downloaded once (27 MB, OUT/cache) and what is up to date is left alone.
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
out=${1:-$here/../../target/guest}

die() {
    echo "guest: $*" >&2
    exit 1
}

# Debian's package of a tool, for the error line.
need() {
    command -v "$1" >/dev/null || die "$1 is missing: apt-get install $2"
}

[ "$(uname -m)" = x86_64 ] || die "the guest is built on x86-64 only"
need gcc gcc
need objcopy binutils
need cpio cpio
need modinfo kmod
need flock util-linux
need apt-get apt
need dpkg-deb dpkg

mkdir -p "$out/cache"
out=$(cd "$out" && pwd)
work=$(mktemp -d "$out/cache/work.XXXXXX")
trap 'rm -rf "$work"' EXIT
exec 9>"$out/cache/lock"
flock 9

# The metapackage names the kernel of the day; of the two the cloud kernel is
# the smaller and has all that a QEMU guest needs.
fetch_kernel() {
    local meta real
    [ -s "$out/cache/root/vmlinuz" ] && return
    for meta in linux-image-cloud-amd64 linux-image-amd64; do
        real=$(apt-cache depends "$meta" 2>/dev/null | sed -n 's/.*Depends: \(linux-image-[0-9].*\)/\1/p' | head -n 1)
        [ -n "$real" ] && break
    done
    [ -n "$real" ] || die "apt knows no linux-image-cloud-amd64: run apt-get update (Debian only)"
    # As root, apt drops its rights to do this, and complains if it can not
    # write into our folder; it then goes on as root.
    (cd "$work" && apt-get download -q "$real") >"$work/log" 2>&1 ||
        die "apt-get download $real failed: $(tail -n 1 "$work/log") (is apt-get update due?)"
    mkdir "$work/root"
    dpkg-deb -x "$work/$real"_*.deb "$work/root" || die "can not unpack $real"
    rm -f "$work"/*.deb
    mv "$work"/root/boot/vmlinuz-* "$work/root/vmlinuz" || die "no kernel in $real"
    echo "$real" >"$work/root/name"
    rm -rf "$out/cache/root"
    mv "$work/root" "$out/cache/root"
}

# Prints the files of a module and all below it, those below first.
# Debian's package has no modules.dep, so the modules themselves are asked.
modules_for() {
    local name=$1 file below
    # The same module goes by two spellings, foo-bar.ko and foo_bar.
    file=$(find "$out/cache/root" -name "${name//[_-]/[_-]}.ko*" -print -quit)
    if [ -z "$file" ]; then
        grep -q "/${name//[_-]/[_-]}\.ko" "$out"/cache/root/lib/modules/*/modules.builtin \
            "$out"/cache/root/usr/lib/modules/*/modules.builtin 2>/dev/null && return
        die "the kernel has no module $name"
    fi
    below=$(modinfo -F depends "$file")
    for name in ${below//,/ }; do
        modules_for "$name"
    done
    echo "$file"
}

pack_initrd() {
    local number=0 file target list
    mkdir -p "$work/initrd/modules"
    # Static: the archive holds no C library.
    gcc -O2 -Wall -Wextra -Werror -static -pthread -o "$work/initrd/init" "$here/init.c" ||
        die "init.c does not build (static C library: apt-get install libc6-dev)"
    list=$(for file in virtio_pci virtio_blk; do modules_for "$file"; done)
    for file in $(awk '!seen[$0]++' <<<"$list"); do
        target=$(printf '%s/initrd/modules/%02d.ko' "$work" "$number")
        case $file in
        *.ko) cp "$file" "$target" ;;
        *.ko.xz) need xz xz-utils && xz -dc "$file" >"$target" ;;
        *.ko.zst) need zstd zstd && zstd -qdc "$file" >"$target" ;;
        *.ko.gz) gzip -dc "$file" >"$target" ;;
        *) die "unknown kind of module: $file" ;;
        esac
        number=$((number + 1))
    done
    # Fixed owner and order: no rights needed, and the same input gives the same archive.
    (cd "$work/initrd" && find . | LC_ALL=C sort | cpio -o -H newc -R 0:0 --quiet) >"$work/initrd.new"
    mv "$work/initrd.new" "$out/initrd"
}

pack_boot() {
    gcc -m32 -ffreestanding -nostdlib -c -o "$work/boot.o" "$here/boot.S" || die "boot.S does not build"
    objcopy -O binary -j .text "$work/boot.o" "$work/boot.new"
    [ "$(stat -c %s "$work/boot.new")" = 1024 ] || die "boot.img is not two sectors"
    mv "$work/boot.new" "$out/boot.img"
}

older() { # OUTPUT INPUT...: is the output missing, or older than an input?
    local output=$1 input
    shift
    for input; do
        [ "$output" -nt "$input" ] || return 0
    done
    return 1
}

fetch_kernel
if older "$out/vmlinuz" "$out/cache/root/vmlinuz"; then
    cp "$out/cache/root/vmlinuz" "$work/vmlinuz" && touch "$work/vmlinuz"
    mv "$work/vmlinuz" "$out/vmlinuz"
fi
if older "$out/initrd" "$here/init.c" "$here/build.sh" "$out/cache/root/name"; then
    pack_initrd
fi
if older "$out/boot.img" "$here/boot.S" "$here/build.sh"; then
    pack_boot
fi
echo "guest: $(cat "$out/cache/root/name") in $out"
