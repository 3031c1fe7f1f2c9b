//! Frames: fixed head, prost header, raw payload.
