//! Tests of lockstep that need more than one node.
//!
//! [`sim`] runs two whole replication cores against simulated disks and a simulated network, in
//! virtual time, from one seed.
pub mod sim;
