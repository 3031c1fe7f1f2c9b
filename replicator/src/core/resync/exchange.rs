//! The bitmap exchange: own bits to the peer, the peer's bits in, the union durable (SEM §11).
use crate::core::Resource;
use crate::core::event::Payload;
use crate::core::fault::Fault;
use crate::core::metadata::BitmapThen;
use bytes::Bytes;
use lockstep_proto::{Message, limits, v1};

impl Resource {
    /// Sends the own bits (nothing but the end mark when both know that all are set).
    pub(super) fn send_bitmap(&mut self, volume: usize) {
        let number = u32::from(self.devices[volume].nr.0);
        let full = self.devices[volume].resync.as_ref().is_some_and(|resync| resync.full);
        let mut first = 0;
        while !full && first < self.devices[volume].bitmap.nr_words() {
            let words = self.devices[volume].bitmap.words(first, limits::MAX_BITMAP_WORDS);
            let count = words.len() as u64;
            // The peer ORs: what is all clear need not travel.
            if words.iter().any(|word| *word != 0) {
                let bytes: Bytes = words.iter().flat_map(|word| word.to_le_bytes()).collect();
                let header = v1::Bitmap { volume: number, first_word: first, last: false };
                self.send(Message::Bitmap(header), Payload::Bytes(bytes));
            }
            first += count.max(1);
        }
        let header = v1::Bitmap { volume: number, first_word: 0, last: true };
        self.send(Message::Bitmap(header), Payload::None);
        if let Some(resync) = &mut self.devices[volume].resync {
            resync.sent_last = true;
        }
        self.bitmaps_exchanged(volume);
    }

    pub(in crate::core) fn on_bitmap_message(&mut self, header: &v1::Bitmap, payload: Payload) {
        let Some(volume) = self.wire_device(header.volume) else {
            self.drop_payload(payload);
            return self.protocol_error("bitmap words for a volume this node does not have");
        };
        if self.devices[volume].resync.is_none() {
            return self.drop_payload(payload);
        }
        let waiting = self.devices[volume].resync.as_ref().is_some_and(|resync| !resync.peer_sent_last);
        if !waiting {
            self.drop_payload(payload);
            return self.protocol_error("bitmap words nobody waits for");
        }
        if self.planted(Fault::BitmapReplaced) {
            self.devices[volume].bitmap.clear_all();
        }
        if let Payload::Bytes(bytes) = &payload {
            let words =
                bytes.chunks_exact(8).map(|word| u64::from_le_bytes(word.try_into().unwrap_or([0xff; 8])));
            let device = &mut self.devices[volume];
            let before = device.bitmap.count();
            if !device.bitmap.merge_words(header.first_word, words) {
                return self.protocol_error("bitmap words past the end of the volume");
            }
            device.foreign_bits += device.bitmap.count().saturating_sub(before);
        }
        self.drop_payload(payload);
        if header.last {
            if let Some(resync) = &mut self.devices[volume].resync {
                resync.peer_sent_last = true;
            }
            self.bitmaps_exchanged(volume);
        }
    }

    /// Both bitmaps are united in memory: now on disk.
    fn bitmaps_exchanged(&mut self, volume: usize) {
        if self.devices[volume]
            .resync
            .as_ref()
            .is_some_and(|resync| resync.sent_last && resync.peer_sent_last)
        {
            self.write_bitmap(volume, BitmapThen::ResyncReady);
        }
    }

    pub(in crate::core) fn resync_bitmap_durable(&mut self, volume: usize) {
        let Some(resync) = &mut self.devices[volume].resync else { return };
        // The target starts behind the last mark announced to it: no page is left to write then.
        let target_waits = !resync.source && resync.sync_uuid.is_none();
        if resync.union_durable || target_waits || !resync.sent_last || !resync.peer_sent_last {
            return;
        }
        resync.union_durable = true;
        self.ask_before_resync(volume);
    }
}
