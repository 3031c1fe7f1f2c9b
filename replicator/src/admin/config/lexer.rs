//! Bytes to tokens (ADM §1.2). Every byte sequence has tokens: what is not a word becomes a `TokenKind::Bad` that the
//! tree reports, unless it stands in a `skip` block.
use super::source::Span;
use winnow::LocatingSlice;
use winnow::combinator::{alt, dispatch, empty, fail, opt, peek, preceded, repeat};
use winnow::prelude::*;
use winnow::token::{any, one_of, take_while};

/// Longest bare word, bytes.
pub(crate) const WORD_MAX: usize = 128;
/// Longest quoted string, bytes between the quotes.
pub(crate) const STRING_MAX: usize = 255;

/// What a token is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum TokenKind {
    Word,
    Quoted,
    Open,
    Close,
    Semicolon,
    BracketOpen,
    BracketClose,
    Colon,
    Bad(Bad),
}

/// Why something is not a token.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Bad {
    Byte,
    WordTooLong,
    StringTooLong,
    StringUnterminated,
    NotUtf8,
}

/// One token.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Token {
    pub(crate) kind: TokenKind,
    pub(crate) span: Span,
}

type Input<'a> = LocatingSlice<&'a [u8]>;

/// `%` is only for the scope of an IPv6 address.
pub(crate) fn is_word_byte(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || matches!(byte, b'/' | b'.' | b'_' | b'-' | b'%' | b'+')
}

/// Splits a whole text. Linear: each byte is looked at a fixed number of times.
pub(crate) fn tokens(file: u32, bytes: &[u8]) -> Vec<Token> {
    let mut out = Vec::with_capacity(bytes.len() / 6);
    // A byte order mark is no statement.
    let skipped = if bytes.starts_with(b"\xEF\xBB\xBF") { 3 } else { 0 };
    let mut input = LocatingSlice::new(&bytes[skipped..]);
    let place = |n: usize| u32::try_from(n + skipped).unwrap_or(u32::MAX);
    loop {
        if blank.parse_next(&mut input).is_err() || input.is_empty() {
            return out;
        }
        // `token` takes at least one byte of any input, so the loop ends.
        let Ok((kind, range)) = token.with_span().parse_next(&mut input) else { return out };
        out.push(Token { kind, span: Span { file, start: place(range.start), end: place(range.end) } });
    }
}

/// White space and comments.
fn blank(input: &mut Input<'_>) -> winnow::Result<()> {
    let space = take_while(1.., b" \t\r\n".as_slice()).void();
    let comment = (b'#', take_while(0.., |b: u8| b != b'\n')).void();
    repeat(0.., alt((space, comment))).parse_next(input)
}

fn token(input: &mut Input<'_>) -> winnow::Result<TokenKind> {
    let start = dispatch! { peek(any);
        b'{' => any.value(TokenKind::Open),
        b'}' => any.value(TokenKind::Close),
        b';' => any.value(TokenKind::Semicolon),
        b'[' => any.value(TokenKind::BracketOpen),
        b']' => any.value(TokenKind::BracketClose),
        b':' => any.value(TokenKind::Colon),
        b'"' => quoted,
        b if is_word_byte(b) => word,
        _ => fail,
    };
    alt((start, foreign)).parse_next(input)
}

fn word(input: &mut Input<'_>) -> winnow::Result<TokenKind> {
    let text: &[u8] = take_while(1.., is_word_byte).parse_next(input)?;
    Ok(if text.len() > WORD_MAX { TokenKind::Bad(Bad::WordTooLong) } else { TokenKind::Word })
}

/// `"..."` on one line; a backslash takes the next character as it is.
fn quoted(input: &mut Input<'_>) -> winnow::Result<TokenKind> {
    let piece = alt((
        take_while(1.., |b: u8| !matches!(b, b'"' | b'\\' | b'\n')).void(),
        (b'\\', opt(one_of(|b: u8| b != b'\n'))).void(),
    ));
    let body = repeat::<_, _, (), _, _>(0.., piece).take();
    let (text, closed): (&[u8], bool) =
        preceded(b'"', (body, alt((b'"'.value(true), empty.value(false))))).parse_next(input)?;
    Ok(match (closed, std::str::from_utf8(text)) {
        (false, _) => TokenKind::Bad(Bad::StringUnterminated),
        (true, Err(_)) => TokenKind::Bad(Bad::NotUtf8),
        (true, Ok(_)) if text.len() > STRING_MAX => TokenKind::Bad(Bad::StringTooLong),
        (true, Ok(_)) => TokenKind::Quoted,
    })
}

/// A run of bytes that belong to no token.
fn foreign(input: &mut Input<'_>) -> winnow::Result<TokenKind> {
    let known = |b: u8| is_word_byte(b) || b" \t\r\n#{};[]:\"".contains(&b);
    take_while(1.., move |b: u8| !known(b)).value(TokenKind::Bad(Bad::Byte)).parse_next(input)
}
