//! drbdsetup's commands: like drbdadm's, but volumes are named by minor and nothing is read from files.
use crate::admin::cli::SetupCommand;
use crate::admin::control::ResourceVerb as R;
use crate::admin::outcome::{self, Failure};
use crate::admin::status_text::disk_pair;
use crate::admin::verbs::Session;
use crate::units::VolumeNr;

/// Carries out a command; answers the exit code. Everything was said.
pub fn run(session: &mut Session<'_>, command: &SetupCommand) -> u8 {
    match try_run(session, command) {
        Ok(code) => code,
        Err(failure) => session.complain(&failure),
    }
}

fn try_run(session: &mut Session<'_>, command: &SetupCommand) -> Result<u8, Failure> {
    use SetupCommand as C;
    match command {
        C::Status { resource, json, statistics } => {
            let names: Vec<String> = resource.iter().filter(|name| *name != "all").cloned().collect();
            session.status(&names, *json, *statistics)
        }
        C::Role { resource } => {
            for view in session.views(Some(resource))? {
                session.line(view.status.role.name());
            }
            Ok(outcome::OK)
        }
        C::Cstate { resource, peer_node_id } => {
            for view in session.views(Some(resource))? {
                check_peer(&view.status.connection.peer_node_id, resource, *peer_node_id)?;
                session.line(view.status.connection.connection.name());
            }
            Ok(outcome::OK)
        }
        C::Dstate { minor } => {
            let (resource, volume) = volume_of(session, minor)?;
            for view in session.views(Some(&resource))? {
                if let Some(own) = view.volume(volume) {
                    session.line(&disk_pair(&view, own));
                }
            }
            Ok(outcome::OK)
        }
        C::Primary { resource, force } => {
            Ok(session.change_named(resource, None, R::Primary { force: *force }))
        }
        C::Secondary { resource } => Ok(session.change_named(resource, None, R::Secondary)),
        C::Down { resource } => Ok(session.change_named(resource, None, R::Down)),
        C::Detach { minor, force } => on_volume(session, minor, R::Detach { force: *force }),
        C::Connect { resource, peer_node_id, discard_my_data, tentative } => {
            let verb = R::Connect { discard_my_data: *discard_my_data, tentative: *tentative };
            on_peer(session, resource, *peer_node_id, None, verb)
        }
        C::Disconnect { resource, peer_node_id, force } => {
            on_peer(session, resource, *peer_node_id, None, R::Disconnect { force: *force })
        }
        C::Invalidate { minor } => on_volume(session, minor, R::Invalidate),
        C::InvalidateRemote { resource, peer_node_id, volume } => {
            on_peer(session, resource, Some(*peer_node_id), Some(VolumeNr(*volume)), R::InvalidateRemote)
        }
        C::Outdate { minor } => on_volume(session, minor, R::Outdate),
        C::NewCurrentUuid { minor, clear_bitmap } => {
            on_volume(session, minor, R::NewCurrentUuid { clear_bitmap: *clear_bitmap })
        }
        C::Resize { minor, resize } => on_volume(session, minor, resize.verb()),
        C::WaitConnectResource { resource } => Ok(session.change_named(resource, None, R::WaitConnect)),
        C::WaitSyncResource { resource } => Ok(session.change_named(resource, None, R::WaitSync)),
    }
}

fn check_peer(actual: &u32, resource: &str, asked: Option<u32>) -> Result<(), Failure> {
    match asked {
        Some(id) if id != *actual => {
            Err(Failure::new(outcome::CONFIG, format!("{resource}: No such connection\n")))
        }
        _ => Ok(()),
    }
}

fn on_peer(
    session: &mut Session<'_>,
    resource: &str,
    peer_node_id: Option<u32>,
    volume: Option<VolumeNr>,
    verb: R,
) -> Result<u8, Failure> {
    for view in session.views(Some(resource))? {
        check_peer(&view.status.connection.peer_node_id, resource, peer_node_id)?;
    }
    Ok(session.change_named(resource, volume, verb))
}

fn on_volume(session: &mut Session<'_>, minor: &str, verb: R) -> Result<u8, Failure> {
    let (resource, volume) = volume_of(session, minor)?;
    Ok(session.change_named(&resource, Some(volume), verb))
}

/// The volume that a minor number, `minor-N`, `/dev/drbdN` or `RES/VOL` means.
fn volume_of(session: &mut Session<'_>, name: &str) -> Result<(String, VolumeNr), Failure> {
    let number = name.strip_prefix("/dev/drbd").or_else(|| name.strip_prefix("minor-")).unwrap_or(name);
    let number: Option<u32> = number.parse().ok();
    for view in session.views(None)? {
        for device in &view.devices {
            let by_name = name.rsplit_once('/').is_some_and(|(resource, volume)| {
                resource == view.status.name && volume.parse() == Ok(device.volume.0)
            });
            if by_name || number == Some(device.minor) {
                return Ok((view.status.name.clone(), device.volume));
            }
        }
    }
    Err(Failure::new(outcome::CONFIG, format!("{name}: No such device\n")))
}
