//! tests of lockstep.
