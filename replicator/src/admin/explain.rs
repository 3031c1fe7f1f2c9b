//! `lockstep explain`: the last decisions of a resource in words, or as JSON.
use crate::admin::view::ResourceView;
use crate::core::explain::{Decision, Names};
use serde::Serialize;

#[derive(Serialize)]
struct Explained<'a> {
    resource: &'a str,
    node: &'a str,
    peer: &'a str,
    connection: &'a str,
    waiting_for: &'a [String],
    decisions: Vec<ExplainedDecision<'a>>,
}

#[derive(Serialize)]
struct ExplainedDecision<'a> {
    ago_ms: u64,
    rule: u8,
    text: String,
    #[serde(flatten)]
    decision: &'a Decision,
}

fn names(view: &ResourceView) -> Names {
    Names {
        resource: view.status.name.clone(),
        me: view.status.node_name.clone(),
        peer: view.status.connection.peer_name.clone(),
    }
}

/// The last `last` decisions of each resource, oldest first.
pub(super) fn as_text(views: &[ResourceView], last: usize) -> String {
    let mut text = String::new();
    for view in views {
        let (names, status) = (names(view), &view.status);
        if !text.is_empty() {
            text.push('\n');
        }
        let decisions = &status.decisions[status.decisions.len().saturating_sub(last)..];
        if decisions.is_empty() {
            text.push_str(&format!(
                "{}: the nodes have not met since {} was brought up here\n",
                names.resource, names.resource
            ));
        }
        for past in decisions {
            text.push_str(&format!("{} ago:\n{}\n", age(past.ago_ms), past.decision.explain(&names)));
        }
        text.push_str(&format!(
            "now: {} is {}, connection to {}: {}\n",
            names.me, status.role, names.peer, status.connection.connection
        ));
        for wait in &status.waiting_for {
            text.push_str(&format!("waiting for: {wait}\n"));
        }
    }
    text
}

/// The same as data, with every fact that was exchanged.
pub(super) fn as_json(views: &[ResourceView], last: usize) -> String {
    let explained: Vec<Explained<'_>> = views
        .iter()
        .map(|view| {
            let status = &view.status;
            let names = names(view);
            let decisions = &status.decisions[status.decisions.len().saturating_sub(last)..];
            Explained {
                resource: &status.name,
                node: &status.node_name,
                peer: &status.connection.peer_name,
                connection: status.connection.connection.name(),
                waiting_for: &status.waiting_for,
                decisions: decisions
                    .iter()
                    .map(|past| ExplainedDecision {
                        ago_ms: past.ago_ms,
                        rule: past.decision.decided.comparison.rule.number(),
                        text: past.decision.explain(&names),
                        decision: &past.decision,
                    })
                    .collect(),
            }
        })
        .collect();
    // Plain data with string keys.
    let mut text = serde_json::to_string_pretty(&explained).unwrap_or_default();
    text.push('\n');
    text
}

/// A time span as people say it.
fn age(ms: u64) -> String {
    match ms / 1000 {
        0 => "less than a second".into(),
        seconds @ 1..=119 => format!("{seconds} s"),
        seconds @ 120..=7199 => format!("{} min", seconds / 60),
        seconds => format!("{} h", seconds / 3600),
    }
}
