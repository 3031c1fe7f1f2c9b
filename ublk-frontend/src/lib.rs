//! ublk-frontend of lockstep.
