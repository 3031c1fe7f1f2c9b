# shellcheck shell=bash
# Disks under the device mapper, sourced after lib.sh: one that errs or loses writes when told to, and one whose every
# write is recorded. There is no udev here, so dmsetup makes its own nodes.

mapper_load() {
    command -v dmsetup >/dev/null || skip "dmsetup is not installed"
    modules dm-mod "$@"
}

dm() { within 60 env DM_DISABLE_UDEV=1 dmsetup "$@"; }

sectors_of() { blockdev --getsz "$1"; }

# mapped NAME TABLE: a new device; prints its node.
mapped() {
    dm create "$1" --table "$2" >&2
    [[ -b /dev/mapper/$1 ]] || dm mknodes "$1" >&2
    echo "/dev/mapper/$1"
}

# remapped NAME TABLE: what is under way finishes on the old table, what comes later sees the new one.
remapped() {
    dm suspend --nolockfs "$1"
    dm load "$1" --table "$2"
    dm resume "$1"
}

# The tables of a disk on BACKING: as it is; erring writes; losing writes without a word; erring or losing for DOWN
# seconds after every UP.
healthy_on() { echo "0 $(sectors_of "$1") linear $1 0"; }
erring_on() { echo "0 $(sectors_of "$1") flakey $1 0 0 3600 1 error_writes"; }
losing_on() { echo "0 $(sectors_of "$1") flakey $1 0 0 3600 1 drop_writes"; }
erring_now_and_then_on() { echo "0 $(sectors_of "$1") flakey $1 0 $2 $3 1 error_writes"; }
