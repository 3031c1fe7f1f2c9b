//! Running the operator's handlers: `sh -c` with DRBD's environment, beside the data path, with a deadline (ADM §8).
use crate::core::event::HandlerName;
use crate::units::VolumeNr;
use std::collections::BTreeMap;
use std::process::Stdio;
use std::time::Duration;
use tokio::process::Command;

/// A handler that has not ended by then is killed and counts as broken. Above the 90 s that fence agents allow
/// themselves.
pub const DEFAULT_LIMIT: Duration = Duration::from_secs(120);

/// The programs of a resource and what they are told.
#[derive(Clone, Debug)]
pub struct HandlerPlan {
    /// Shell commands, by name; what is not here is not configured.
    pub commands: BTreeMap<HandlerName, String>,
    /// Environment of all of them.
    pub environment: Vec<(String, String)>,
    /// More of it for those about one volume.
    pub volume_environment: BTreeMap<VolumeNr, Vec<(String, String)>>,
    /// How long one may take.
    pub limit: Duration,
}

impl Default for HandlerPlan {
    fn default() -> Self {
        Self {
            commands: BTreeMap::new(),
            environment: Vec::new(),
            volume_environment: BTreeMap::new(),
            limit: DEFAULT_LIMIT,
        }
    }
}

impl HandlerPlan {
    /// The configured command.
    pub(super) fn command(&self, name: HandlerName, volume: Option<VolumeNr>) -> Option<Command> {
        let text = self.commands.get(&name)?;
        let mut command = Command::new("sh");
        command.arg("-c").arg(text).stdin(Stdio::null()).kill_on_drop(true);
        command
            .env_clear()
            .env("HOME", "/")
            .env("TERM", "linux")
            .env("PATH", "/sbin:/usr/sbin:/bin:/usr/bin")
            .envs(self.environment.iter().map(|(name, value)| (name, value)));
        if let Some(more) = volume.and_then(|volume| self.volume_environment.get(&volume)) {
            command.envs(more.iter().map(|(name, value)| (name, value)));
        }
        Some(command)
    }
}

/// Runs one to its end; `None` when it did not start, was killed, or took longer than `limit`.
pub(super) async fn run(resource: &str, name: HandlerName, command: Command, limit: Duration) -> Option<i32> {
    let mut command = command;
    tracing::info!(resource, "helper command: {}", name.name());
    let mut child = match command.spawn() {
        Ok(child) => child,
        Err(error) => {
            tracing::error!(resource, "helper command: {} cannot be started: {error}", name.name());
            return None;
        }
    };
    let code = match tokio::time::timeout(limit, child.wait()).await {
        Ok(Ok(status)) => status.code(),
        Ok(Err(error)) => {
            tracing::error!(resource, "helper command: {}: {error}", name.name());
            None
        }
        Err(_elapsed) => {
            tracing::error!(resource, "helper command: {} killed after {limit:?}", name.name());
            if let Err(error) = child.kill().await {
                tracing::error!(resource, "helper command: {} cannot be killed: {error}", name.name());
            }
            None
        }
    };
    match code {
        Some(code) => {
            tracing::info!(
                resource,
                "helper command: {} exit code {code} ({:#x})",
                name.name(),
                (code & 0xff) << 8
            );
        }
        None => tracing::warn!(resource, "helper command: {} has no exit code", name.name()),
    }
    code
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan(text: &str, limit: Duration) -> HandlerPlan {
        HandlerPlan {
            commands: BTreeMap::from([(HandlerName::FencePeer, text.to_owned())]),
            environment: vec![("DRBD_RESOURCE".into(), "r0".into())],
            volume_environment: BTreeMap::from([(
                VolumeNr(3),
                vec![("DRBD_VOLUME".to_owned(), "3".to_owned())],
            )]),
            limit,
        }
    }

    async fn outcome(plan: &HandlerPlan, volume: Option<VolumeNr>) -> Option<i32> {
        let command = plan.command(HandlerName::FencePeer, volume).unwrap();
        run("r0", HandlerName::FencePeer, command, plan.limit).await
    }

    #[tokio::test]
    async fn the_exit_code_comes_back_and_the_environment_is_drbds() {
        let script = r#"test "$DRBD_RESOURCE" = r0 && test "$DRBD_VOLUME" = 3 && test -z "$CARGO" && exit 4"#;
        let plan = plan(script, Duration::from_secs(10));
        assert_eq!(outcome(&plan, Some(VolumeNr(3))).await, Some(4));
        assert_eq!(outcome(&plan, None).await, Some(1));
        assert!(plan.command(HandlerName::SplitBrain, None).is_none());
    }

    #[tokio::test]
    async fn one_that_hangs_is_killed() {
        assert_eq!(outcome(&plan("sleep 60", Duration::from_millis(50)), None).await, None);
    }
}
