//! Tokens to statements. Everything in the language is `WORD* ;` or `WORD* { statements }`, so one loop reads the whole
//! shape, and an error inside a statement ends at the next `;` or `}`. What the words mean is decided in `read`.
use super::diagnostics::{Problem, Sink};
use super::lexer::{Bad, Token, TokenKind, tokens};
use super::source::{Sources, Span};
use std::borrow::Cow;
use std::ops::Range;

/// Blocks inside blocks at most; the deepest real construct needs 5.
pub(crate) const NESTING_MAX: usize = 16;

/// A word, a quoted string or one of `[ ] :`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Word {
    pub(crate) span: Span,
    pub(crate) kind: TokenKind,
}

/// A statement. `words` is never empty unless the block has no header, which has been reported.
#[derive(Debug)]
pub(crate) struct Node {
    pub(crate) words: Range<usize>,
    pub(crate) block: Option<Vec<Node>>,
    /// The words, or the brace when there are none.
    pub(crate) span: Span,
    /// Something in it was reported already: say nothing more about it.
    pub(crate) bad: bool,
}

/// One file as statements, spans kept, nothing interpreted.
#[derive(Debug)]
pub(crate) struct RawConfig {
    words: Vec<Word>,
    pub(crate) nodes: Vec<Node>,
}

impl RawConfig {
    pub(crate) fn words(&self, node: &Node) -> &[Word] {
        self.words.get(node.words.clone()).unwrap_or(&[])
    }
}

/// The text a word stands for, quotes and escapes removed.
pub(crate) fn text_of(sources: &Sources, word: Word) -> Cow<'_, str> {
    let raw = String::from_utf8_lossy(sources.slice(word.span));
    if word.kind != TokenKind::Quoted {
        return raw;
    }
    let inner = raw.strip_prefix('"').and_then(|r| r.strip_suffix('"')).unwrap_or(&raw);
    let mut out = String::with_capacity(inner.len());
    let mut chars = inner.chars();
    while let Some(c) = chars.next() {
        out.extend(if c == '\\' { chars.next() } else { Some(c) });
    }
    Cow::Owned(out)
}

struct Frame {
    nodes: Vec<Node>,
    header: Range<usize>,
    span: Span,
    open: Span,
    bad: bool,
}

struct Builder<'a> {
    sources: &'a Sources,
    sink: &'a mut Sink,
    words: Vec<Word>,
    /// First word of the statement being read.
    start: usize,
    bad: bool,
    top: Vec<Node>,
    frames: Vec<Frame>,
}

/// Reads the shape of file `file`.
pub(crate) fn parse(sources: &Sources, file: u32, sink: &mut Sink) -> RawConfig {
    let mut b = Builder {
        sources,
        sink,
        words: Vec::new(),
        start: 0,
        bad: false,
        top: Vec::new(),
        frames: Vec::new(),
    };
    let all = tokens(file, sources.bytes(file));
    let mut at = 0;
    while let Some(token) = all.get(at) {
        at += 1;
        match token.kind {
            TokenKind::Word
            | TokenKind::Quoted
            | TokenKind::BracketOpen
            | TokenKind::BracketClose
            | TokenKind::Colon => b.words.push(Word { span: token.span, kind: token.kind }),
            TokenKind::Semicolon => b.semicolon(token.span),
            TokenKind::Close => b.close(token.span),
            TokenKind::Bad(why) => b.bad_token(token.span, why),
            TokenKind::Open if b.is_skip() => at = b.skip_block(&all, at, token.span),
            TokenKind::Open if b.frames.len() >= NESTING_MAX => {
                b.sink.push(
                    Problem::error(token.span, "blocks are nested too deep")
                        .hint(format!("{NESTING_MAX} levels are the limit")),
                );
                at = b.skip_block(&all, at, token.span);
            }
            TokenKind::Open => b.open(token.span),
        }
    }
    b.end();
    RawConfig { words: b.words, nodes: b.top }
}

impl Builder<'_> {
    fn is_skip(&self) -> bool {
        self.words
            .get(self.start)
            .is_some_and(|w| w.kind == TokenKind::Word && self.sources.slice(w.span) == b"skip")
    }

    fn push(&mut self, node: Node) {
        match self.frames.last_mut() {
            Some(frame) => frame.nodes.push(node),
            None => self.top.push(node),
        }
    }

    /// The words since the last statement and their span.
    fn take_words(&mut self, at: Span) -> (Range<usize>, Span) {
        let range = self.start..self.words.len();
        self.start = self.words.len();
        let span = match (self.words.get(range.start), self.words.last()) {
            (Some(first), Some(last)) => first.span.to(last.span),
            _ => at,
        };
        (range, span)
    }

    fn statement(&mut self, at: Span) {
        let (words, span) = self.take_words(at);
        let bad = std::mem::take(&mut self.bad);
        self.push(Node { words, block: None, span, bad });
    }

    fn semicolon(&mut self, at: Span) {
        if self.start == self.words.len() && !self.bad {
            self.sink.push(Problem::error(at, "a ';' without a statement").hint("remove it"));
        } else {
            self.statement(at);
        }
    }

    fn open(&mut self, at: Span) {
        let bad = std::mem::take(&mut self.bad);
        let (header, span) = self.take_words(at);
        if header.is_empty() && !bad {
            self.sink.push(Problem::error(at, "a '{' without the name of a section before it"));
        }
        self.frames.push(Frame { nodes: Vec::new(), bad: bad || header.is_empty(), header, span, open: at });
    }

    /// Words before a `}` or the end of the file lack their `;`.
    fn unfinished(&mut self, at: Span) {
        if self.start == self.words.len() {
            self.bad = false;
            return;
        }
        if let Some(last) = self.words.last().filter(|_| !self.bad) {
            self.sink.push(
                Problem::error(last.span.after(), "expected ';' here").hint("end the statement with ';'"),
            );
        }
        self.statement(at);
    }

    fn close(&mut self, at: Span) {
        self.unfinished(at);
        match self.frames.pop() {
            Some(f) => {
                self.push(Node { words: f.header, block: Some(f.nodes), span: f.span, bad: f.bad });
            }
            None => self.sink.push(
                Problem::error(at, "a '}' that closes nothing")
                    .hint("there is one '}' too many, here or before"),
            ),
        }
    }

    fn bad_token(&mut self, span: Span, why: Bad) {
        self.bad = true;
        let problem = match why {
            Bad::Byte => Problem::error(span, "these characters are not allowed in a bare word")
                .hint("letters, digits and '/ . _ -' are; quote anything else: \"...\""),
            Bad::WordTooLong => {
                Problem::error(span, "the word is too long").hint("128 characters are the limit")
            }
            Bad::StringTooLong => {
                Problem::error(span, "the string is too long").hint("255 characters are the limit")
            }
            Bad::StringUnterminated => {
                Problem::error(Span { end: span.start + 1, ..span }, "the string does not end on its line")
                    .hint("close it with '\"'")
            }
            Bad::NotUtf8 => Problem::error(span, "the string is not valid UTF-8"),
        };
        self.sink.push(problem);
    }

    /// Passes over a balanced block whose `{` is just behind; returns the position after its `}`.
    fn skip_block(&mut self, all: &[Token], mut at: usize, open: Span) -> usize {
        self.words.truncate(self.start);
        self.bad = false;
        let mut depth = 1_usize;
        while let Some(token) = all.get(at) {
            at += 1;
            match token.kind {
                TokenKind::Open => depth += 1,
                TokenKind::Close => depth -= 1,
                _ => {}
            }
            if depth == 0 {
                return at;
            }
        }
        self.sink.push(Problem::error(open, "this '{' is never closed").hint("add the missing '}'"));
        at
    }

    fn end(&mut self) {
        self.unfinished(Span::default());
        while let Some(f) = self.frames.pop() {
            self.sink.push(Problem::error(f.open, "this '{' is never closed").hint("add the missing '}'"));
            self.push(Node { words: f.header, block: Some(f.nodes), span: f.span, bad: f.bad });
        }
    }
}
