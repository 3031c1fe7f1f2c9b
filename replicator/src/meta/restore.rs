//! Reads the text of `dump-md` back (DISK §13): what `restore-md` and `verify-dump` take.
//!
//! Statement order is fixed, white space and `#` comments are free. Every error carries line, column, what
//! was expected there, and a hint where one is known.
use crate::meta::dump::UNCLEAN_WORD;
use crate::meta::layout::{DEFAULT_AL_STRIPE_SIZE_4K, DEFAULT_AL_STRIPES, MAX_DEVICE_SECTORS};
use crate::meta::superblock::BYTES_PER_BIT;
use crate::units::{SECTORS_PER_BIT, SectorCount};
use thiserror::Error;
use winnow::Parser;
use winnow::ascii::{digit1, multispace1, till_line_ending};
use winnow::combinator::{alt, opt, repeat};
use winnow::error::ContextError;
use winnow::token::take_while;

/// Most words a bitmap may hold: that of the largest supported device.
pub const MAX_BITMAP_WORDS: u64 = MAX_DEVICE_SECTORS / SECTORS_PER_BIT / 64;

/// The values of a dump.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RestoredMeta {
    /// current, bitmap, history younger, history older.
    pub uuid: [u64; 4],
    /// Superblock flags.
    pub flags: u32,
    /// Last agreed size.
    pub la_size: SectorCount,
    /// Identity of the backing metadata.
    pub device_uuid: u64,
    /// Last known limit of the peer, bytes.
    pub la_peer_max_bio_size: u32,
    /// Activity-log stripes.
    pub al_stripes: u32,
    /// Blocks of a stripe.
    pub al_stripe_size_4k: u32,
    /// Bitmap words from the start as (count, word).
    pub bitmap: Vec<(u64, u64)>,
}

impl RestoredMeta {
    /// Number of bitmap words.
    #[must_use]
    pub fn words(&self) -> u64 {
        self.bitmap.iter().map(|(count, _)| count).sum()
    }
}

/// A dump that cannot be read.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("line {line}, column {column}: expected {expected}, found {found}{}", .hint.map(|hint| format!(" ({hint})")).unwrap_or_default())]
pub struct RestoreError {
    /// Line, from 1.
    pub line: usize,
    /// Column, from 1, in characters.
    pub column: usize,
    /// What the grammar allows here.
    pub expected: String,
    /// What is there.
    pub found: String,
    /// What to do about it.
    pub hint: Option<&'static str>,
}

/// Reads a dump.
///
/// # Errors
/// The first place where the text leaves the grammar or a value leaves its range.
pub fn parse(text: &str) -> Result<RestoredMeta, RestoreError> {
    let mut reader = Reader { text, rest: text };
    reader.word("version")?;
    let at = reader.skip();
    let version = reader.string()?;
    if version != "v08" {
        let hint = Some("only dumps of DRBD 8.4 metadata can be restored");
        return Err(reader.error_at(at, "\"v08\"", hint));
    }
    reader.punct(';')?;
    reader.skip();
    if reader.rest.starts_with(UNCLEAN_WORD) {
        let hint = Some("this is the dump of an unclean disk: run apply-al there and dump it again");
        return Err(reader.error_at(reader.rest, "uuid", hint));
    }
    reader.word("uuid")?;
    reader.punct('{')?;
    let mut uuid = [0; 4];
    for place in &mut uuid {
        *place = reader.hex64()?;
        reader.punct(';')?;
    }
    reader.word("flags")?;
    let flags = reader.hex32()?;
    reader.punct(';')?;
    reader.punct('}')?;
    // Very old dumps state the number of extents; newer ones have it in a comment.
    reader.optional_number("al-extents", u64::from(u32::MAX))?;
    let la_size = reader.required_number("la-size-sect", MAX_DEVICE_SECTORS)?;
    reader.word("bm-byte-per-bit")?;
    let at = reader.skip();
    if reader.number(u64::MAX)? != u64::from(BYTES_PER_BIT) {
        return Err(reader.error_at(at, "4096", Some("v08 knows no other granularity")));
    }
    reader.punct(';')?;
    reader.word("device-uuid")?;
    let device_uuid = reader.hex64()?;
    reader.punct(';')?;
    let la_peer_max_bio_size = reader.optional_u32("la-peer-max-bio-size")?.unwrap_or(0);
    let al_stripes = reader.optional_u32("al-stripes")?.unwrap_or(DEFAULT_AL_STRIPES);
    let al_stripe_size_4k = reader.optional_u32("al-stripe-size-4k")?.unwrap_or(DEFAULT_AL_STRIPE_SIZE_4K);
    let bitmap = reader.bitmap()?;
    reader.skip();
    if !reader.rest.is_empty() {
        return Err(reader.error_at(reader.rest, "the end of the dump", None));
    }
    Ok(RestoredMeta {
        uuid,
        flags,
        la_size: SectorCount(la_size),
        device_uuid,
        la_peer_max_bio_size,
        al_stripes,
        al_stripe_size_4k,
        bitmap,
    })
}

/// The text and what is left of it. Lexing is winnow's; places of errors come from the difference.
struct Reader<'a> {
    text: &'a str,
    rest: &'a str,
}

impl<'a> Reader<'a> {
    /// Skips white space and comments; returns the place behind.
    fn skip(&mut self) -> &'a str {
        let comment = ('#', till_line_ending::<_, ContextError>).void();
        let mut blank = repeat::<_, _, (), _, _>(0.., alt((multispace1.void(), comment)));
        if blank.parse_next(&mut self.rest).is_err() {
            // A repetition from zero accepts everything; nothing was consumed.
            return self.rest;
        }
        self.rest
    }

    fn error_at(&self, place: &str, expected: &str, hint: Option<&'static str>) -> RestoreError {
        let before = self.text.get(..self.text.len() - place.len()).unwrap_or_default();
        let line_start = before.rfind('\n').map_or(0, |at| at + 1);
        let found = match place.chars().next() {
            None => "the end of the text".to_owned(),
            Some(';' | '{' | '}' | '"') => format!("`{}`", place.chars().next().unwrap_or_default()),
            Some(_) => {
                let word =
                    place.split(|c: char| c.is_whitespace() || ";{}".contains(c)).next().unwrap_or_default();
                format!("`{}`", word.chars().take(40).collect::<String>())
            }
        };
        RestoreError {
            line: before.matches('\n').count() + 1,
            column: before.get(line_start..).unwrap_or_default().chars().count() + 1,
            expected: expected.to_owned(),
            found,
            hint,
        }
    }

    fn try_lex<O>(&mut self, mut lexer: impl Parser<&'a str, O, ContextError>) -> Option<O> {
        self.skip();
        let mut rest = self.rest;
        let found = lexer.parse_next(&mut rest).ok()?;
        self.rest = rest;
        Some(found)
    }

    fn lex<O>(
        &mut self,
        lexer: impl Parser<&'a str, O, ContextError>,
        expected: &str,
        hint: Option<&'static str>,
    ) -> Result<O, RestoreError> {
        let at = self.skip();
        self.try_lex(lexer).ok_or_else(|| self.error_at(at, expected, hint))
    }

    fn try_word(&mut self, word: &str) -> bool {
        let name = take_while(1.., |c: char| c.is_ascii_alphanumeric() || "-_".contains(c));
        self.try_lex(name.verify(|found: &str| found == word)).is_some()
    }

    fn word(&mut self, word: &str) -> Result<(), RestoreError> {
        let at = self.skip();
        if self.try_word(word) {
            return Ok(());
        }
        let hint = if word == "version" { Some("is this the output of dump-md?") } else { None };
        Err(self.error_at(at, word, hint))
    }

    fn punct(&mut self, mark: char) -> Result<(), RestoreError> {
        self.lex(mark.void(), &format!("`{mark}`"), None)
    }

    fn string(&mut self) -> Result<&'a str, RestoreError> {
        let inside = take_while(1..=20, |c: char| c != '"' && c != '\n');
        self.lex(('"', inside, '"').map(|(_, inside, _)| inside), "a string in double quotes", None)
    }

    fn hex(&mut self, digits: usize) -> Result<u64, RestoreError> {
        let number = take_while(1.., |c: char| c.is_ascii_alphanumeric());
        let lexer = (
            alt(("0x", "0X")),
            number
                .verify(move |found: &str| found.len() == digits)
                .verify_map(|found: &str| u64::from_str_radix(found, 16).ok()),
        );
        let expected = format!("a hexadecimal number of {digits} digits");
        self.lex(lexer.map(|(_, value)| value), &expected, Some("leading zeroes must be written"))
    }

    fn hex64(&mut self) -> Result<u64, RestoreError> {
        self.hex(16)
    }

    fn hex32(&mut self) -> Result<u32, RestoreError> {
        let at = self.skip();
        let value = self.hex(8)?;
        u32::try_from(value).map_err(|_| self.error_at(at, "a hexadecimal number of 8 digits", None))
    }

    fn number(&mut self, max: u64) -> Result<u64, RestoreError> {
        let lexer = digit1
            .verify(|digits: &str| digits.len() <= 19)
            .verify_map(|digits: &str| digits.parse::<u64>().ok())
            .verify(|value| *value <= max);
        self.lex(lexer, &format!("a number up to {max}"), None)
    }

    fn required_number(&mut self, word: &str, max: u64) -> Result<u64, RestoreError> {
        self.word(word)?;
        let value = self.number(max)?;
        self.punct(';')?;
        Ok(value)
    }

    fn optional_number(&mut self, word: &str, max: u64) -> Result<Option<u64>, RestoreError> {
        if !self.try_word(word) {
            return Ok(None);
        }
        let value = self.number(max)?;
        self.punct(';')?;
        Ok(Some(value))
    }

    fn optional_u32(&mut self, word: &str) -> Result<Option<u32>, RestoreError> {
        let value = self.optional_number(word, u64::from(u32::MAX))?;
        Ok(value.and_then(|value| u32::try_from(value).ok()))
    }

    fn bitmap(&mut self) -> Result<Vec<(u64, u64)>, RestoreError> {
        self.word("bm")?;
        self.punct('{')?;
        let mut runs: Vec<(u64, u64)> = Vec::new();
        let mut words = 0u64;
        loop {
            let at = self.skip();
            if self.try_lex('}').is_some() {
                return Ok(runs);
            }
            // `0x...` starts with a digit too, so the count must not be followed by an `x`.
            let count =
                (digit1, multispace1, "times", multispace1).map(|(digits, _, _, _): (&str, _, _, _)| digits);
            let count = match self.try_lex(opt(count)).flatten() {
                None => 1,
                Some(digits) => digits
                    .parse()
                    .ok()
                    .filter(|count| (1..=MAX_BITMAP_WORDS).contains(count))
                    .ok_or_else(|| self.error_at(at, "a count of words", None))?,
            };
            let word = self.hex64()?;
            self.punct(';')?;
            words += count;
            if words > MAX_BITMAP_WORDS {
                return Err(self.error_at(at, "the end of the bitmap", Some("it is larger than any device")));
            }
            match runs.last_mut() {
                Some((run, value)) if *value == word => *run += count,
                Some(_) | None => runs.push((count, word)),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::meta::dump::{BitmapDump, dumped_words, write_head};
    use crate::meta::{Layout, MetaKind, Superblock};
    use proptest::prelude::*;

    fn dump(superblock: &Superblock, layout: &Layout, words: &[u64]) -> String {
        let mut out = Vec::new();
        write_head(&mut out, &["a comment".to_owned(), String::new()], superblock, layout).unwrap();
        let mut body = BitmapDump::default();
        body.push(&mut out, words).unwrap();
        body.finish(&mut out).unwrap();
        String::from_utf8(out).unwrap()
    }

    fn sample() -> String {
        let layout = Layout::for_device(MetaKind::Internal, 64 << 20, 0, 1, 8).unwrap();
        dump(&Superblock::created(&layout), &layout, &[])
    }

    #[test]
    fn errors_point_at_the_place() {
        let fail = |from: &str, to: &str| parse(&sample().replacen(from, to, 1)).unwrap_err();
        let error = fail("la-size-sect 0;", "la-size-sect x;");
        assert_eq!((error.line, error.column), (16, 14));
        assert_eq!(error.to_string(), "line 16, column 14: expected a number up to 2199023255552, found `x`");
        let error = fail("0x0000000000000004", "0x4");
        assert!(
            error.to_string().contains("16 digits, found `0x4` (leading zeroes must be written)"),
            "{error}"
        );
        assert!(fail("\"v08\"", "\"v09\"").to_string().contains("only dumps of DRBD 8.4"));
        assert!(fail("bm {", "bm {\n0x00").to_string().contains("16 digits"));
        assert!(
            fail("bm {", "bm {\n99999999999999 times 0x0000000000000000;").to_string().contains("a count")
        );
        assert!(fail("bm {", "bm {\n0 times 0x0000000000000000;").to_string().contains("a count"));
        assert!(fail("version", "Version").to_string().contains("is this the output of dump-md?"));
        assert_eq!(parse("").unwrap_err().found, "the end of the text");
        assert_eq!(fail("bm-byte-per-bit 4096", "bm-byte-per-bit 8192").expected, "4096");
        let mut trailing = sample();
        trailing.push_str("more");
        assert!(parse(&trailing).is_err());
    }

    #[test]
    fn a_dump_of_an_unclean_disk_does_not_restore() {
        let layout = Layout::for_device(MetaKind::Internal, 64 << 20, 0, 1, 8).unwrap();
        let mut superblock = Superblock::created(&layout);
        superblock.flags = 0x13;
        let error = parse(&dump(&superblock, &layout, &[])).unwrap_err();
        assert!(error.to_string().contains("run apply-al"), "{error}");
    }

    proptest! {
        #[test]
        fn what_is_dumped_is_restored(uuid: [u64; 4], flags: u32, device_uuid: u64, la in 1u64..131_072, runs in proptest::collection::vec((1usize..40, any::<u32>(), any::<bool>()), 0..40)) {
            let layout = Layout::for_device(MetaKind::Internal, 64 << 20, 0, 2, 8).unwrap();
            let mut superblock = Superblock::created(&layout);
            superblock.uuid = uuid;
            superblock.flags = flags | 0x80;
            superblock.device_uuid = device_uuid;
            superblock.la_size = SectorCount(la);
            let mut words = Vec::new();
            for (count, word, equal) in runs {
                let word = u64::from(word);
                words.extend(std::iter::repeat_n(if equal { word << 32 | word } else { word }, count));
            }
            words.resize(usize::try_from(dumped_words(&superblock, &layout)).unwrap(), 0);
            let found = parse(&dump(&superblock, &layout, &words)).unwrap();
            let mut restored = Vec::new();
            for (count, word) in &found.bitmap {
                restored.extend(std::iter::repeat_n(*word, usize::try_from(*count).unwrap()));
            }
            prop_assert_eq!(restored, words);
            prop_assert_eq!((found.uuid, found.flags, found.la_size.0), (uuid, flags | 0x80, la));
            prop_assert_eq!((found.device_uuid, found.al_stripes, found.al_stripe_size_4k), (device_uuid, 2, 8));
        }

        #[test]
        fn any_text_parses_without_panic(cut in 0usize..700, insert in "\\PC{0,12}") {
            let mut text = sample();
            let cut = cut.min(text.len());
            text.insert_str(cut, &insert);
            if let Err(error) = parse(&text) {
                prop_assert!(error.line >= 1 && error.column >= 1);
            }
        }
    }
}
