//! What is wrong with a text, where, and what to do about it. Rendered as plain text:
//!
//! ```text
//! r0.res:3:11: error: unknown option 'timout' in section 'net'
//!     3 |     net { timout 60; }
//!       |           ^^^^^^
//!       = hint: did you mean 'timeout'?
//! ```
use super::source::{Location, Sources, Span};
use serde::Serialize;

/// Problems kept at most for one configuration; more help nobody, and memory must stay bounded on garbage.
pub const DIAGNOSTICS_MAX: usize = 200;

/// How bad it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub enum Severity {
    /// The configuration cannot be used.
    Error,
    /// The configuration is used; a statement in it does less than it says.
    Warning,
}

/// A second place that belongs to a diagnostic.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Note {
    /// Where.
    pub location: Location,
    /// What is there.
    pub message: String,
}

/// One problem.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Diagnostic {
    /// Error or warning.
    pub severity: Severity,
    /// One sentence in lower case.
    pub message: String,
    /// Where it starts; `None` when it has no place in a text.
    pub location: Option<Location>,
    /// The source line, cut to screen width.
    pub source_line: String,
    /// First marked character in `source_line`, from 0.
    pub caret: usize,
    /// Marked characters, at least 1.
    pub caret_len: usize,
    /// What to write instead, or which range is allowed.
    pub hint: Option<String>,
    /// Other places, such as the first use of a name.
    pub notes: Vec<Note>,
}

impl Diagnostic {
    /// A problem without a place, such as a file that cannot be opened.
    #[must_use]
    pub fn without_place(message: String) -> Self {
        Self {
            severity: Severity::Error,
            message,
            location: None,
            source_line: String::new(),
            caret: 0,
            caret_len: 1,
            hint: None,
            notes: Vec::new(),
        }
    }

    /// Plain text, several lines, ending in a newline.
    #[must_use]
    pub fn render(&self) -> String {
        let mut out = String::new();
        let word = match self.severity {
            Severity::Error => "error",
            Severity::Warning => "warning",
        };
        if let Some(at) = &self.location {
            out.push_str(&format!("{}:{}:{}: {word}: {}\n", at.file, at.line, at.column, self.message));
            out.push_str(&format!("{:>5} | {}\n", at.line, self.source_line));
            out.push_str(&format!("      | {}{}\n", " ".repeat(self.caret), "^".repeat(self.caret_len)));
        } else {
            out.push_str(&format!("{word}: {}\n", self.message));
        }
        if let Some(hint) = &self.hint {
            out.push_str(&format!("      = hint: {hint}\n"));
        }
        for note in &self.notes {
            let at = &note.location;
            out.push_str(&format!("{}:{}:{}: note: {}\n", at.file, at.line, at.column, note.message));
        }
        out
    }
}

/// All of them, one below the other.
#[must_use]
pub fn render_all(diagnostics: &[Diagnostic]) -> String {
    diagnostics.iter().map(Diagnostic::render).collect()
}

/// A problem while spans are still spans.
#[derive(Debug)]
pub(crate) struct Problem {
    severity: Severity,
    span: Span,
    message: String,
    hint: Option<String>,
    notes: Vec<(Span, String)>,
}

impl Problem {
    pub(crate) fn error(span: Span, message: impl Into<String>) -> Self {
        Self { severity: Severity::Error, span, message: message.into(), hint: None, notes: Vec::new() }
    }

    pub(crate) fn warning(span: Span, message: impl Into<String>) -> Self {
        Self { severity: Severity::Warning, ..Self::error(span, message) }
    }

    pub(crate) fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    pub(crate) fn note(mut self, span: Span, message: impl Into<String>) -> Self {
        self.notes.push((span, message.into()));
        self
    }
}

/// Collects problems up to [`DIAGNOSTICS_MAX`] and counts the rest.
#[derive(Debug, Default)]
pub(crate) struct Sink {
    problems: Vec<Problem>,
    left_out: usize,
    errors: usize,
}

impl Sink {
    pub(crate) fn push(&mut self, problem: Problem) {
        self.errors += usize::from(problem.severity == Severity::Error);
        // An error is never crowded out of the verdict: `errors` counts it even when it is not kept.
        if self.full() { self.left_out += 1 } else { self.problems.push(problem) }
    }

    /// No more problems are kept: costly hints need not be computed.
    pub(crate) fn full(&self) -> bool {
        self.problems.len() >= DIAGNOSTICS_MAX
    }

    pub(crate) fn errors(&self) -> usize {
        self.errors
    }

    pub(crate) fn has_errors(&self) -> bool {
        self.errors > 0
    }

    /// Finished diagnostics, in order of place (files in the order they were read).
    pub(crate) fn finish(mut self, sources: &Sources) -> Vec<Diagnostic> {
        self.problems.sort_by_key(|p| (p.span.file, p.span.start));
        let mut all: Vec<Diagnostic> = self.problems.iter().map(|p| finish_one(p, sources)).collect();
        if self.left_out > 0 {
            let mut more =
                Diagnostic::without_place(format!("{} more problems are not shown", self.left_out));
            if !self.has_errors() {
                more.severity = Severity::Warning;
            }
            all.push(more);
        }
        all
    }
}

fn finish_one(problem: &Problem, sources: &Sources) -> Diagnostic {
    let cut = sources.cut(problem.span);
    let note = |(span, message): &(Span, String)| Note {
        location: sources.location(*span),
        message: message.clone(),
    };
    Diagnostic {
        severity: problem.severity,
        message: problem.message.clone(),
        location: Some(sources.location(problem.span)),
        source_line: cut.text,
        caret: cut.caret,
        caret_len: cut.caret_len,
        hint: problem.hint.clone(),
        notes: problem.notes.iter().map(note).collect(),
    }
}
