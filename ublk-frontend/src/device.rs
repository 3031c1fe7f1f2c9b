//! Life cycle of a device: everything that is not on the data path.
//!
//! A [`Device`] owns a **control thread**. `libublk` keeps its control ring in a thread-local, and several commands sleep in the
//! driver for as long as other threads please (START_DEV until every tag is fetched and the partitions are read, STOP_DEV until
//! every request is answered, DEL_DEV until every descriptor is closed). On a thread of their own, each call gets a time limit,
//! and a command that came too late still runs to its end in order.
//!
//! Two things `libublk` would do by itself are arranged here: it waits for its own queue threads before START_DEV, so we report
//! our queue as ready in their place; and it writes a state file into a world-writable directory, which it leaves out when no
//! queue thread has registered. We keep no state file: a device of ours is recognised by a mark in the driver ([`OWNER_MARK`]).

use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::thread::{self, JoinHandle};
use std::time::Duration;
use std::{fs, io};

use libublk::ctrl::{UblkCtrl, UblkCtrlBuilder};
use libublk::io::UblkDev;
use libublk::{UblkFlags, sys};
use nix::unistd::{SysconfVar, sysconf};
use tracing::{debug, info, warn};

use crate::config::DeviceConfig;
use crate::error::{UblkError, control, to_io_error};
use crate::kernel;
use crate::params::{self, Geometry};
use crate::queue::Queue;

/// The node of the driver that takes control commands.
pub const CONTROL_PATH: &str = "/dev/ublk-control";

/// Limit for each control command, in seconds. Generous: a loaded machine answers in milliseconds.
pub const BRING_UP_TIMEOUT_S: u64 = 30;

/// Upper half of the driver's free per-device word: "LKST". The lower half is the process id of the server.
const OWNER_MARK: u64 = 0x4c4b_5354;

/// How long to wait for a device node, in steps of [`NODE_WAIT_STEP`]: udev may be slow.
const NODE_WAIT_STEPS: u32 = 500;
/// One step of that wait.
const NODE_WAIT_STEP: Duration = Duration::from_millis(10);

/// Control handle of one device. See the crate's documentation for the order of calls.
///
/// Dropping it without [`Device::delete`] stops and deletes the device in the background, which needs the ring owner to go on
/// serving until its queue is drained, and then to drop the queue.
#[derive(Debug)]
pub struct Device {
    id: u32,
    commands: Sender<(Command, Sender<Result<(), UblkError>>)>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Command {
    Start,
    Stop,
    Delete,
}

impl Command {
    fn name(self) -> &'static str {
        match self {
            Self::Start => "starting the ublk device",
            Self::Stop => "stopping the ublk device",
            Self::Delete => "deleting the ublk device",
        }
    }

    /// What a late command is waiting for.
    fn hint(self) -> &'static str {
        match self {
            Self::Start => "not every tag is fetched, or the first reads are not answered",
            Self::Stop => "requests in flight are not answered",
            Self::Delete => "the queue is not dropped, or the ring still holds its commands",
        }
    }
}

impl Device {
    /// Adds a device and maps its queue; nothing is visible to users yet.
    ///
    /// # Errors
    ///
    /// [`UblkError`]; [`UblkError::is_unavailable`] tells whether this machine can do ublk at all. Nothing is left behind
    /// on error, save for [`UblkError::Timeout`].
    pub fn add(config: DeviceConfig) -> Result<(Self, Queue), UblkError> {
        config.check(page_bytes())?;
        check_machine()?;

        let (reply, added) = mpsc::channel();
        let (commands, inbox) = mpsc::channel();
        let thread = thread::Builder::new()
            .name("ublk-control".to_owned())
            .spawn(move || control_thread(&config, &reply, &inbox))
            .map_err(UblkError::Thread)?;
        let (id, queue) = match added.recv_timeout(Duration::from_secs(BRING_UP_TIMEOUT_S)) {
            Ok(added) => added?,
            Err(RecvTimeoutError::Disconnected) => return Err(UblkError::ThreadGone),
            Err(RecvTimeoutError::Timeout) => {
                return Err(UblkError::Timeout {
                    command: "adding the ublk device",
                    seconds: BRING_UP_TIMEOUT_S,
                    hint: "the driver does not answer",
                });
            }
        };
        Ok((Self { id, commands, thread: Some(thread) }, queue))
    }

    /// Number of the device: the N of `/dev/ublkbN`.
    #[must_use]
    pub fn id(&self) -> u32 {
        self.id
    }

    /// The block device that users open. It exists between [`Device::start`] and [`Device::stop`].
    #[must_use]
    pub fn block_path(&self) -> PathBuf {
        PathBuf::from(format!("/dev/ublkb{}", self.id))
    }

    /// Makes the disk visible. Returns when `/dev/ublkbN` exists.
    ///
    /// Blocks until every tag is fetched, and the kernel reads the partition table meanwhile: the ring must be driven by
    /// another thread. A device is started once; for another run delete it and add a new one.
    ///
    /// # Errors
    ///
    /// [`UblkError::Timeout`] if the queue is not served; [`UblkError::Control`] with the driver's reason.
    pub fn start(&self) -> Result<(), UblkError> {
        self.call(Command::Start)?;
        wait_for_node(&self.block_path())
    }

    /// Whether somebody holds the started disk for himself: mounted, swap, a member of LVM or RAID, opened with `O_EXCL`.
    ///
    /// To be asked before [`Device::stop`], which takes the disk away from its users without asking. A program that just has the
    /// disk open is not seen, and the answer may be out of date when it arrives. Opens the disk read-only for a moment.
    ///
    /// # Errors
    ///
    /// What the open said, other than "busy": for example that the disk is not there.
    pub fn is_held(&self) -> io::Result<bool> {
        let flags = nix::fcntl::OFlag::O_EXCL | nix::fcntl::OFlag::O_CLOEXEC;
        match fs::OpenOptions::new().read(true).custom_flags(flags.bits()).open(self.block_path()) {
            Ok(_) => Ok(false),
            Err(error) if error.kind() == io::ErrorKind::ResourceBusy => Ok(true),
            Err(error) => Err(error),
        }
    }

    /// Removes the disk: no new requests, those in flight are waited for, then every tag of the queue ends.
    ///
    /// Whoever still has the disk open gets errors from then on (`EIO`, for writes `ENOSPC`); see [`Device::is_held`].
    /// May be called again, also after a timeout.
    ///
    /// # Errors
    ///
    /// [`UblkError::Timeout`] if requests in flight stay unanswered; the stop goes on in the background.
    pub fn stop(&self) -> Result<(), UblkError> {
        self.call(Command::Stop)
    }

    /// Deletes the device (stopping it first if that was not done). The queue must have been dropped, or be dropped meanwhile.
    ///
    /// # Errors
    ///
    /// [`UblkError::Timeout`] if the queue is still there; the deletion happens when it is dropped.
    pub fn delete(mut self) -> Result<(), UblkError> {
        self.call(Command::Delete)?;
        if let Some(thread) = self.thread.take() {
            // The thread ends after its answer to Delete. A panic in it has been reported by the panic hook.
            if thread.join().is_err() {
                return Err(UblkError::ThreadGone);
            }
        }
        Ok(())
    }

    fn call(&self, command: Command) -> Result<(), UblkError> {
        let (reply, answer) = mpsc::channel();
        self.commands.send((command, reply)).map_err(|_| UblkError::ThreadGone)?;
        match answer.recv_timeout(Duration::from_secs(BRING_UP_TIMEOUT_S)) {
            Ok(result) => result,
            Err(RecvTimeoutError::Disconnected) => Err(UblkError::ThreadGone),
            Err(RecvTimeoutError::Timeout) => Err(UblkError::Timeout {
                command: command.name(),
                seconds: BRING_UP_TIMEOUT_S,
                hint: command.hint(),
            }),
        }
    }
}

/// What the control thread holds. The file goes before the deletion, which waits for it.
struct Controlled {
    id: u32,
    ctrl: UblkCtrl,
    dev: Option<UblkDev>,
}

/// Adds the device, reports it, then serves commands until one deletes it or the handle is dropped.
fn control_thread(
    config: &DeviceConfig,
    reply: &Sender<Result<(u32, Queue), UblkError>>,
    inbox: &Receiver<(Command, Sender<Result<(), UblkError>>)>,
) {
    let (mut controlled, queue) = match Controlled::add(config) {
        Ok(added) => added,
        Err(error) => {
            // Nobody listening means the caller timed out; there is nothing left to undo.
            let _nobody = reply.send(Err(error));
            return;
        }
    };
    info!(device = controlled.id, size_bytes = config.size_bytes, "ublk device added");
    if reply.send(Ok((controlled.id, queue))).is_err() {
        // The caller gave up; the queue came back with the error and is dropped.
        controlled.delete_logged();
        return;
    }
    while let Ok((command, answer)) = inbox.recv() {
        let result = match command {
            Command::Start => controlled.start(),
            Command::Stop => controlled.stop(),
            Command::Delete => controlled.delete(),
        };
        let done = command == Command::Delete && result.is_ok();
        if let Err(mpsc::SendError(late)) = answer.send(result) {
            debug!(device = controlled.id, ?command, ?late, "a ublk command ended after its caller gave up");
        }
        if done {
            return;
        }
    }
    controlled.delete_logged();
}

impl Controlled {
    fn add(config: &DeviceConfig) -> Result<(Self, Queue), UblkError> {
        let features = UblkCtrl::get_features().unwrap_or(0);
        if features & u64::from(sys::UBLK_F_CMD_IOCTL_ENCODE) == 0 {
            return Err(UblkError::TooOld { features });
        }
        let ctrl = UblkCtrlBuilder::default()
            .name(&config.name)
            .nr_queues(1)
            .depth(config.queue_depth)
            .io_buf_bytes(config.max_io_bytes)
            // No recovery flags: the disk goes away with its server. See the crate's documentation.
            .ctrl_flags(0)
            .ctrl_target_flags(owner_word(std::process::id()))
            .dev_flags(UblkFlags::UBLK_DEV_F_ADD_DEV)
            .build()
            .map_err(|error| UblkError::Control { command: "ADD_DEV", source: to_io_error(error) })?;
        // From here on, dropping `ctrl` deletes the device.
        let granted = ctrl.dev_info();
        let params = params::device_params(config, granted.max_io_buf_bytes);
        control("SET_PARAMS", ctrl.set_params(&params))?;
        let mut kept = sys::ublk_params { types: params.types, ..Default::default() };
        control("GET_PARAMS", ctrl.get_params(&mut kept))?;
        if !params::kept(&params, &kept) {
            return Err(UblkError::ParamsDropped);
        }

        let init = |dev: &mut UblkDev| {
            dev.tgt.dev_size = config.size_bytes;
            // START_DEV of the crate sets the parameters again, from here.
            dev.tgt.params = params;
            Ok(())
        };
        let dev = UblkDev::new(config.name.clone(), init, &ctrl).map_err(|error| UblkError::Control {
            command: "open of the character device",
            source: to_io_error(error),
        })?;
        let geometry = Geometry { nr_sectors: config.nr_sectors(), max_io_bytes: granted.max_io_buf_bytes };
        let page = usize::try_from(page_bytes()).unwrap_or(usize::MAX);
        let queue = Queue::map(dev.tgt.fds[0], granted.queue_depth, geometry, page)
            .map_err(|source| UblkError::Map { path: ctrl.get_cdev_path(), source })?;
        Ok((Self { id: granted.dev_id, ctrl, dev: Some(dev) }, queue))
    }

    fn start(&self) -> Result<(), UblkError> {
        let dev = self.dev.as_ref().ok_or(UblkError::ThreadGone)?;
        // libublk waits here for its own queue thread to report its buffers; ours are the caller's, so report in its
        // place. The driver itself still waits until every tag is fetched.
        dev.notify_buffer_registration_complete(false);
        control("START_DEV", self.ctrl.start_dev(dev))?;
        info!(device = self.id, "ublk disk started");
        Ok(())
    }

    fn stop(&self) -> Result<(), UblkError> {
        control("STOP_DEV", self.ctrl.stop_dev())?;
        info!(device = self.id, "ublk disk stopped");
        Ok(())
    }

    fn delete(&mut self) -> Result<(), UblkError> {
        if self.dev.is_some() {
            self.stop()?;
        }
        self.dev = None;
        match control("DEL_DEV", self.ctrl.del_dev()) {
            // Somebody else's clean-up was faster.
            Err(UblkError::Control { source, .. }) if source.raw_os_error() == Some(ENODEV) => {}
            result => result?,
        }
        info!(device = self.id, "ublk device deleted");
        Ok(())
    }

    fn delete_logged(&mut self) {
        if let Err(error) = self.delete() {
            warn!(device = self.id, %error, "ublk device could not be deleted");
        }
    }
}

const ENODEV: i32 = nix::errno::Errno::ENODEV as i32;

/// Deletes the dead character devices that crashed processes of ours left behind; returns how many.
///
/// A device counts as left behind if it bears our mark, is dead, and the process that added it is gone. Devices of other
/// programs and of running processes are not touched. Meant to be called at start, before the first [`Device::add`].
///
/// # Errors
///
/// Those of [`Device::add`] about the machine, and [`UblkError::Timeout`]; a device that cannot be deleted is logged and skipped.
pub fn sweep_dead_devices() -> Result<usize, UblkError> {
    check_machine()?;
    let (reply, swept) = mpsc::channel();
    // A thread of its own: libublk's control ring would stay with the caller's, and DEL_DEV sleeps while a descriptor is open
    // (one passed to a process in another namespace, where ours cannot see that it lives).
    thread::Builder::new()
        .name("ublk-sweep".to_owned())
        .spawn(move || {
            let count = device_ids().into_iter().filter(|&id| sweep_one_logged(id)).count();
            // Nobody listening means the caller timed out; the deletions stand.
            let _nobody = reply.send(count);
        })
        .map_err(UblkError::Thread)?;
    match swept.recv_timeout(Duration::from_secs(BRING_UP_TIMEOUT_S)) {
        Ok(count) => Ok(count),
        Err(RecvTimeoutError::Disconnected) => Err(UblkError::ThreadGone),
        Err(RecvTimeoutError::Timeout) => Err(UblkError::Timeout {
            command: "deleting dead ublk devices",
            seconds: BRING_UP_TIMEOUT_S,
            hint: "a process still has one of them open",
        }),
    }
}

/// [`sweep_one`], with failures only logged: one stubborn device must not keep the others.
fn sweep_one_logged(id: i32) -> bool {
    sweep_one(id).unwrap_or_else(|error| {
        warn!(device = id, %error, "ublk device left behind by a crash could not be deleted");
        false
    })
}

/// Deletes the device if it is a dead one of ours.
fn sweep_one(id: i32) -> Result<bool, UblkError> {
    let ctrl = UblkCtrl::new_simple(id)
        .map_err(|error| UblkError::Control { command: "GET_DEV_INFO", source: to_io_error(error) })?;
    let info = ctrl.dev_info();
    if u32::from(info.state) != sys::UBLK_S_DEV_DEAD {
        return Ok(false);
    }
    let Some(pid) = owner_pid(info.ublksrv_flags) else { return Ok(false) };
    if Path::new("/proc").join(pid.to_string()).exists() {
        return Ok(false);
    }
    control("DEL_DEV", ctrl.del_dev())?;
    info!(device = id, pid, "ublk device left behind by a crash deleted");
    Ok(true)
}

/// Numbers of all ublk devices of the machine, in order.
fn device_ids() -> Vec<i32> {
    let Ok(entries) = fs::read_dir("/sys/class/ublk-char") else { return Vec::new() };
    let mut ids: Vec<i32> = entries
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.strip_prefix("ublkc")?.parse().ok())
        .collect();
    ids.sort_unstable();
    ids
}

/// The driver's per-device word for a server with this process id.
fn owner_word(pid: u32) -> u64 {
    OWNER_MARK << 32 | u64::from(pid)
}

/// The process id in a word that bears our mark.
fn owner_pid(word: u64) -> Option<u32> {
    (word >> 32 == OWNER_MARK).then(|| u32::try_from(word & u64::from(u32::MAX)).ok()).flatten()
}

/// Whether the driver is there, may be used, and is not known to crash.
fn check_machine() -> Result<(), UblkError> {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let release = release.trim();
    if let Some(reason) = kernel::known_bad(release) {
        return Err(UblkError::BadKernel { release: release.to_owned(), reason });
    }
    match fs::OpenOptions::new().read(true).write(true).open(CONTROL_PATH) {
        Ok(_) => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
            Err(UblkError::Permission { path: CONTROL_PATH, source: error })
        }
        // ENXIO and ENODEV: a stale node without its driver.
        Err(_) => Err(UblkError::NoDriver { path: CONTROL_PATH }),
    }
}

/// Waits until udev or devtmpfs made the node.
#[expect(
    clippy::disallowed_methods,
    reason = "control plane on a blocking call; the kernel offers nothing to wait on"
)]
fn wait_for_node(path: &Path) -> Result<(), UblkError> {
    for _ in 0..NODE_WAIT_STEPS {
        if path.exists() {
            return Ok(());
        }
        thread::sleep(NODE_WAIT_STEP);
    }
    let wait = NODE_WAIT_STEP * NODE_WAIT_STEPS;
    Err(UblkError::Timeout {
        command: "waiting for the block device node",
        seconds: wait.as_secs(),
        hint: "udev or devtmpfs did not make it",
    })
}

/// Page size of this machine in bytes.
fn page_bytes() -> u32 {
    sysconf(SysconfVar::PAGE_SIZE).ok().flatten().and_then(|bytes| u32::try_from(bytes).ok()).unwrap_or(4096)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_owner_word_carries_the_process() {
        assert_eq!(owner_pid(owner_word(4711)), Some(4711));
        assert_eq!(owner_pid(owner_word(u32::MAX)), Some(u32::MAX));
    }

    #[test]
    fn devices_of_others_are_not_ours() {
        for word in [0, 1, 4711, u64::MAX, 0x4c4b_5355 << 32] {
            assert_eq!(owner_pid(word), None, "{word:#x}");
        }
    }

    #[test]
    fn a_bad_configuration_is_refused_before_the_driver_is_asked() {
        let error = Device::add(DeviceConfig { queue_depth: 0, ..DeviceConfig::new(1 << 20) }).unwrap_err();
        assert!(matches!(error, UblkError::Config(_)), "{error}");
    }

    #[test]
    #[expect(clippy::print_stdout, reason = "a skipped test says why")]
    fn a_machine_without_the_driver_is_told_so() {
        if Path::new(CONTROL_PATH).exists() {
            println!("skipped: {CONTROL_PATH} exists");
            return;
        }
        let error = Device::add(DeviceConfig::new(1 << 20)).unwrap_err();
        assert!(matches!(error, UblkError::NoDriver { .. }), "{error}");
        assert!(error.is_unavailable());
    }
}
