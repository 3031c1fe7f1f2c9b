#!/bin/bash
# The tests of ublk-frontend that need the driver, which outside of a VM say "skipped": `ublk_device.sh PROGRAM`, the
# test program that `cargo test -p lockstep-ublk-frontend --test ublk_device --no-run` makes.
. "${0%/*}/../lib.sh"
program=${1:-}
[[ -x $program ]] || skip "no test program"
modules ublk_drv
wait_for '[[ -c /dev/ublk-control ]]' 10

step "tests of the front end on real devices"
within 300 "$program" --test-threads=1 --nocapture &>/run/vm/tests.log || fail "$(cat /run/vm/tests.log)"
cat /run/vm/tests.log
check "none was skipped" bash -c '! grep -q "skipped: " /run/vm/tests.log'
check "at least five passed" grep -qE '^test result: ok. ([5-9]|[1-9][0-9]+) passed; 0 failed; 0 ignored' /run/vm/tests.log
check "no device is left" bash -c '! compgen -G "/dev/ublkb*"'
passed
