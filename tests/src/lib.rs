//! Tests of lockstep that need more than one node.
//!
//! [`sim`] runs two whole replication cores against simulated disks and a simulated network, in
//! virtual time, from one seed. [`write_log`] takes apart what a kernel recorded below two real nodes.
pub mod catalogue;
#[cfg(feature = "planted-faults")]
pub mod planted;
pub mod procedures;
pub mod sim;
pub mod write_log;
