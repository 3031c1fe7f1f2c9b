//! The one program behind the names lockstep, lockstepd, drbdadm, drbdsetup and drbdmeta.
use lockstep_replicator::admin::entry;
use std::process::ExitCode;

fn main() -> ExitCode {
    ExitCode::from(entry::run(std::env::args_os().collect()))
}
