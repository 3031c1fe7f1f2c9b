//! Operators' events in DRBD's words: `role( Secondary -> Primary )`.
use crate::core::event::{Event, Severity};
use crate::units::{SECTORS_PER_BIT, VolumeNr};

/// KiB covered by a bitmap bit.
const KIB_PER_BIT: u64 = SECTORS_PER_BIT / 2;

/// Writes one event to the log.
pub(super) fn tell(resource: &str, event: &Event) {
    match event {
        Event::Role(from, to) => tracing::info!(resource, "role( {from} -> {to} )"),
        Event::PeerRole(from, to) => tracing::info!(resource, "peer( {from} -> {to} )"),
        Event::Conn(from, to) => tracing::info!(resource, "conn( {from} -> {to} )"),
        Event::Repl(VolumeNr(volume), from, to) => tracing::info!(resource, volume, "repl( {from} -> {to} )"),
        Event::Disk(VolumeNr(volume), from, to) => tracing::info!(resource, volume, "disk( {from} -> {to} )"),
        Event::PeerDisk(VolumeNr(volume), from, to) => {
            tracing::info!(resource, volume, "pdsk( {from} -> {to} )");
        }
        Event::Handshake(decision) => tracing::info!(resource, "{decision}"),
        Event::ResyncDone { volume: VolumeNr(volume), bits_total, bits_failed, elapsed_ms } => {
            let total_kib = bits_total * KIB_PER_BIT;
            let rate = total_kib * 1000 / (*elapsed_ms).max(1);
            let seconds = elapsed_ms / 1000;
            if *bits_failed == 0 {
                tracing::info!(
                    resource,
                    volume,
                    "Resync done (total {seconds} sec; {total_kib} KiB; {rate} K/sec)"
                );
            } else {
                let failed_kib = bits_failed * KIB_PER_BIT;
                tracing::error!(
                    resource,
                    volume,
                    "Resync done (total {seconds} sec; {total_kib} KiB; {rate} K/sec), but {failed_kib} KiB could \
                     not be copied: the disk stays Inconsistent"
                );
            }
        }
        Event::OutOfSync { volume: VolumeNr(volume), range } => {
            let (start, size) = (range.start().0, range.len().0);
            tracing::error!(resource, volume, "Out of sync: start={start}, size={size} (sectors)");
        }
        Event::VerifyDone { volume: VolumeNr(volume), bits_total, elapsed_ms, .. } => {
            let total_kib = bits_total * KIB_PER_BIT;
            let rate = total_kib * 1000 / (*elapsed_ms).max(1);
            let seconds = elapsed_ms / 1000;
            tracing::info!(
                resource,
                volume,
                "Online verify done (total {seconds} sec; {total_kib} KiB; {rate} K/sec)"
            );
        }
        Event::Note(Severity::Error, text) => tracing::error!(resource, "{text}"),
        Event::Note(Severity::Warning, text) => tracing::warn!(resource, "{text}"),
        Event::Note(Severity::Info, text) => tracing::info!(resource, "{text}"),
    }
}
