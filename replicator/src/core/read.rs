//! Reads of the application: from the own disk where it is good, else from the peer (SEM §9).
//!
//! A read that fails on one copy is tried on the other, once; `repair.rs` then mends the bad block.
use super::event::{BufferId, DiskOk, DiskOp, IoError, Output, Payload, RequestError, RequestOp};
use super::fault::Fault;
use super::repair::FailedIo;
use super::request::{Leg, wire_id};
use super::{IoContext, Resource};
use lockstep_proto::{Message, v1};

impl Resource {
    pub(super) fn submit_read(&mut self, key: usize) {
        let request = &self.requests[key];
        let (volume, range, buffer) = (request.volume, request.range, request.buffer);
        let device = &self.devices[volume];
        let careless = self.planted(Fault::ReadInconsistent) && device.writable();
        if (device.readable(range) || careless) && request.local != Leg::Failed {
            self.requests[key].local = Leg::Pending;
            self.submit_io(volume, DiskOp::Read, Some(range), false, buffer, IoContext::Request(key));
        } else if device.peer_readable() && request.peer != Leg::Failed {
            let header = v1::BlockRequest {
                volume: u32::from(device.nr.0),
                sector: range.start().0,
                nr_sectors: range.len().0,
                request: wire_id(key, request.seq),
            };
            self.requests[key].peer = Leg::Pending;
            self.send(Message::DataRequest(header), Payload::None);
        } else if self.waits_for_data(volume) {
            self.park_read(key);
        } else {
            self.complete_read(key, Err(RequestError::Io), None);
        }
    }

    /// No copy can be read now: from the start again when IO goes on.
    pub(super) fn park_read(&mut self, key: usize) {
        let request = &mut self.requests[key];
        (request.local, request.peer, request.retried) = (Leg::None, Leg::None, false);
        self.park_request(key);
    }

    pub(super) fn on_local_read_done(&mut self, key: usize, result: Result<DiskOk, IoError>) {
        let (volume, range) = (self.requests[key].volume, self.requests[key].range);
        match result {
            Ok(_) => {
                self.devices[volume].counters.read_sectors += range.len().0;
                self.requests[key].local = Leg::Ok;
                self.complete_read(key, Ok(()), None);
            }
            Err(error) => {
                self.requests[key].local = Leg::Failed;
                let io = FailedIo::Read;
                self.on_local_io_error(volume, "a read from the local disk", io, range, error);
                self.retry_read(key);
            }
        }
    }

    /// One copy failed: the other one, once.
    pub(super) fn retry_read(&mut self, key: usize) {
        let volume = self.requests[key].volume;
        if self.waits_for_data(volume) {
            self.park_read(key);
        } else if std::mem::replace(&mut self.requests[key].retried, true) {
            self.complete_read(key, Err(RequestError::Io), None);
        } else {
            self.submit_read(key);
        }
    }

    pub(super) fn on_data_reply(&mut self, header: &v1::BlockReply, payload: Payload) {
        let waiting = self.find_request(header.request).filter(|key| {
            self.requests[*key].op == RequestOp::Read && self.requests[*key].peer == Leg::Pending
        });
        let (Some(key), Payload::Buffer { id, len }) = (waiting, payload.clone()) else {
            self.drop_payload(payload);
            return self.protocol_error("data for a read that is not waiting");
        };
        let range = self.requests[key].range;
        if range.start().0 != header.sector || range.len() != len {
            self.drop_payload(payload);
            return self.protocol_error("data that does not fit the read it answers");
        }
        let volume = self.requests[key].volume;
        self.devices[volume].counters.received_sectors += len.0;
        self.requests[key].peer = Leg::Ok;
        self.complete_read(key, Ok(()), Some(id));
    }

    pub(super) fn on_neg_data_reply(&mut self, header: &v1::BlockAck) {
        let Some(key) =
            self.find_request(header.request).filter(|key| self.requests[*key].peer == Leg::Pending)
        else {
            return self.protocol_error("a refused read that is not waiting");
        };
        self.requests[key].peer = Leg::Failed;
        self.retry_read(key);
    }

    fn complete_read(&mut self, key: usize, result: Result<(), RequestError>, data: Option<BufferId>) {
        let request = self.requests.remove(key);
        self.out.push_back(Output::Complete { id: request.id, result, data });
    }
}
