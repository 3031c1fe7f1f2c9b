//! Texts and places in them. A span is three numbers; lines and columns are worked out only when somebody must be told.
use serde::Serialize;

/// Bytes `start..end` of one file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Span {
    pub(crate) file: u32,
    pub(crate) start: u32,
    pub(crate) end: u32,
}

impl Span {
    /// From the start of `self` to the end of `last`.
    pub(crate) fn to(self, last: Self) -> Self {
        Self { end: last.end.max(self.end), ..self }
    }

    /// The empty place right behind the span.
    pub(crate) fn after(self) -> Self {
        Self { start: self.end, ..self }
    }
}

/// A place a person can go to.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct Location {
    /// File as it was named, `STDIN` for standard input.
    pub file: String,
    /// From 1.
    pub line: u32,
    /// From 1, in characters.
    pub column: u32,
}

/// One text.
#[derive(Debug)]
struct SourceFile {
    name: String,
    bytes: Vec<u8>,
    line_starts: Vec<u32>,
}

/// Every text that was read, in order.
#[derive(Debug, Default)]
pub(crate) struct Sources {
    files: Vec<SourceFile>,
}

/// A line cut to what fits a screen, with the place of the caret in it (both in characters).
#[derive(Debug)]
pub(crate) struct Cut {
    pub(crate) text: String,
    pub(crate) caret: usize,
    pub(crate) caret_len: usize,
}

/// Characters of a source line shown at most; a 10 MB line must not be printed once per error.
const CUT_MAX: usize = 160;
/// Beyond this many bytes in a line the column counts bytes: counting characters again for each error would be quadratic.
const COLUMN_EXACT_MAX: usize = 4096;

impl Sources {
    /// Adds a text; `None` when it is too long for 32-bit positions.
    pub(crate) fn add(&mut self, name: &str, bytes: Vec<u8>) -> Option<u32> {
        u32::try_from(bytes.len()).ok()?;
        let id = u32::try_from(self.files.len()).ok()?;
        let mut line_starts = vec![0];
        let ends = bytes.iter().enumerate().filter(|(_, b)| **b == b'\n');
        line_starts.extend(ends.filter_map(|(i, _)| u32::try_from(i + 1).ok()));
        self.files.push(SourceFile { name: name.to_owned(), bytes, line_starts });
        Some(id)
    }

    /// The names of all texts.
    pub(crate) fn names(&self) -> Vec<String> {
        self.files.iter().map(|f| f.name.clone()).collect()
    }

    /// Name of one text.
    pub(crate) fn name(&self, file: u32) -> &str {
        self.files.get(file as usize).map_or("", |f| &f.name)
    }

    /// All bytes of one text.
    pub(crate) fn bytes(&self, file: u32) -> &[u8] {
        self.files.get(file as usize).map_or(&[], |f| &f.bytes)
    }

    /// The bytes of a span.
    pub(crate) fn slice(&self, span: Span) -> &[u8] {
        self.bytes(span.file).get(span.start as usize..span.end as usize).unwrap_or(&[])
    }

    /// Whether the two places are on the same line.
    pub(crate) fn same_line(&self, a: Span, b: Span) -> bool {
        a.file == b.file && !self.slice(Span { file: a.file, start: a.end, end: b.start }).contains(&b'\n')
    }

    /// Line (from 0) and the line's bytes without its end.
    fn line(&self, span: Span) -> (usize, usize, &[u8]) {
        let Some(file) = self.files.get(span.file as usize) else { return (0, 0, &[]) };
        let line = file.line_starts.partition_point(|s| *s <= span.start).saturating_sub(1);
        let start = file.line_starts.get(line).map_or(0, |s| *s as usize);
        let end = file.line_starts.get(line + 1).map_or(file.bytes.len(), |s| *s as usize - 1);
        (line, start, file.bytes.get(start..end).unwrap_or(&[]))
    }

    /// Where a span starts.
    pub(crate) fn location(&self, span: Span) -> Location {
        let (line, start, text) = self.line(span);
        let before = (span.start as usize).saturating_sub(start).min(text.len());
        let column = if before <= COLUMN_EXACT_MAX { count_chars(&text[..before]) } else { before };
        let whole = |n: usize| u32::try_from(n + 1).unwrap_or(u32::MAX);
        Location { file: self.name(span.file).to_owned(), line: whole(line), column: whole(column) }
    }

    /// The line of a span as it can be shown, control characters replaced so that the caret stays below its word.
    pub(crate) fn cut(&self, span: Span) -> Cut {
        let (_, start, text) = self.line(span);
        let at = (span.start as usize).saturating_sub(start).min(text.len());
        let from = at.saturating_sub(CUT_MAX / 2);
        let to = text.len().min(from + CUT_MAX);
        let clean = |bytes: &[u8]| -> String {
            String::from_utf8_lossy(bytes).chars().map(|c| if c.is_control() { ' ' } else { c }).collect()
        };
        let end = (span.end as usize).saturating_sub(start).clamp(at, to);
        let (before, marked) = (clean(&text[from..at]), clean(&text[at..end]));
        let (caret, caret_len) = (before.chars().count(), marked.chars().count().max(1));
        let shown = before + &marked + clean(&text[end..to]).trim_end();
        Cut { text: shown, caret, caret_len }
    }
}

/// Characters of possibly broken UTF-8.
fn count_chars(bytes: &[u8]) -> usize {
    String::from_utf8_lossy(bytes).chars().count()
}
