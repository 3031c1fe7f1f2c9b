//! The one program behind the names lockstep, lockstepd, drbdadm, drbdsetup and drbdmeta.
fn main() {}
