//! The text of `dump-md` (DISK §13), line for line as drbdmeta prints it, so that either tool restores
//! what the other dumped.
//!
//! One difference is meant: drbdmeta up to 9.32 prints `flags 0x00000000` in every v08 dump, whatever the
//! flags are. Here they are printed as they are, as later versions do.
//!
//! The bitmap may be 512 MiB of mostly equal words, so it is pushed through [`BitmapDump`] piece by piece.
use crate::meta::Superblock;
use crate::meta::layout::Layout;
use std::io::{self, Write};

/// Words on one line.
const WORDS_PER_LINE: u64 = 4;
/// Shortest run of equal words that is written as `N times`.
const MIN_RUN: u64 = 8;
/// A comment with the covered position stands before every line that starts at a multiple of this.
const WORDS_PER_COMMENT: u64 = 32;
/// KiB of user data covered by one word.
const KIB_PER_WORD: u64 = 64 * 4;

/// The word that makes restoring a dump of an unclean disk fail on purpose.
pub const UNCLEAN_WORD: &str = "This_is_an_unclean_meta_data_dump._Don't_trust_the_bitmap.";

/// Number of bitmap words a dump shows: whole pages up to the last agreed size, at most the area.
#[must_use]
pub fn dumped_words(superblock: &Superblock, layout: &Layout) -> u64 {
    layout.bitmap_bytes_for(superblock.la_size) / 8
}

/// Writes everything up to and including the opening of the bitmap. `header` holds the comment lines at
/// the top, without their `# `.
///
/// # Errors
/// Those of `out`.
pub fn write_head(
    out: &mut dyn Write,
    header: &[String],
    superblock: &Superblock,
    layout: &Layout,
) -> io::Result<()> {
    for line in header {
        writeln!(out, "{}", format!("# {line}").trim_end())?;
    }
    writeln!(out, "\nversion \"v08\";\n")?;
    if !superblock.is_clean() {
        writeln!(out, "{UNCLEAN_WORD}")?;
        writeln!(out, "# You should \"apply-al\" first, if you plan to restore this.\n")?;
    }
    writeln!(out, "# md_size_sect {}", superblock.md_size_sect)?;
    writeln!(out, "# md_offset {}", layout.superblock_byte())?;
    writeln!(out, "# al_offset {}", layout.al_byte())?;
    writeln!(out, "# bm_offset {}\n", layout.bitmap_byte())?;
    writeln!(out, "uuid {{")?;
    let [current, bitmap, younger, older] = superblock.uuid;
    writeln!(out, "    0x{current:016X}; 0x{bitmap:016X}; 0x{younger:016X}; 0x{older:016X};")?;
    writeln!(out, "    flags 0x{:08X};\n}}", superblock.flags)?;
    writeln!(out, "# al-extents {};", superblock.al_nr_extents)?;
    writeln!(out, "la-size-sect {};", superblock.la_size.0)?;
    writeln!(out, "bm-byte-per-bit {};", superblock.bm_bytes_per_bit)?;
    writeln!(out, "device-uuid 0x{:016X};", superblock.device_uuid)?;
    writeln!(out, "la-peer-max-bio-size {};", superblock.la_peer_max_bio_size)?;
    writeln!(out, "al-stripes {};", superblock.al_stripes)?;
    writeln!(out, "al-stripe-size-4k {};", superblock.al_stripe_size_4k)?;
    writeln!(out, "# bm-bytes {};", dumped_words(superblock, layout) * 8)?;
    writeln!(out, "bm {{")
}

/// The bitmap body. Push all words in order, then [`Self::finish`].
///
/// State between pushes: a run of `run` words `head` that starts at a line start, then at most a line of
/// words in `tail` that followed it.
#[derive(Debug, Default)]
pub struct BitmapDump {
    line_start: u64,
    head: u64,
    run: u64,
    tail: Vec<u64>,
    bits_set: u64,
}

impl BitmapDump {
    /// Adds words.
    ///
    /// # Errors
    /// Those of `out`.
    pub fn push(&mut self, out: &mut dyn Write, words: &[u64]) -> io::Result<()> {
        for word in words {
            self.push_run(out, *word, 1)?;
        }
        Ok(())
    }

    /// Adds `count` times `word`; cheap for the holes of a sparse area.
    ///
    /// # Errors
    /// Those of `out`.
    pub fn push_run(&mut self, out: &mut dyn Write, word: u64, count: u64) -> io::Result<()> {
        self.bits_set += u64::from(word.count_ones()) * count;
        let mut left = count;
        while left > 0 {
            if self.run == 0 {
                self.head = word;
            }
            if self.tail.is_empty() && word == self.head {
                self.run += left;
                left = 0;
            } else {
                self.tail.push(word);
                left -= 1;
            }
            self.emit(out, false)?;
        }
        Ok(())
    }

    /// Writes what is certain: a run that has ended, a full line.
    fn emit(&mut self, out: &mut dyn Write, last: bool) -> io::Result<()> {
        // Only words of two equal halves are counted; drbdmeta compares 32-bit words.
        let countable = self.head >> 32 == self.head & u64::from(u32::MAX);
        loop {
            let whole = self.run / WORDS_PER_LINE * WORDS_PER_LINE;
            let ended = last || !self.tail.is_empty();
            if countable && whole >= MIN_RUN {
                if !ended {
                    return Ok(());
                }
                self.comment(out)?;
                writeln!(out, "    {whole} times 0x{:016X};", self.head)?;
                self.line_start += whole;
                self.run -= whole;
            } else if self.run + self.tail.len() as u64 >= WORDS_PER_LINE && (ended || !countable) {
                let from_run = self.run.min(WORDS_PER_LINE);
                let from_tail = usize::try_from(WORDS_PER_LINE - from_run).unwrap_or(0);
                self.comment(out)?;
                write!(out, "   ")?;
                for _ in 0..from_run {
                    write!(out, " 0x{:016X};", self.head)?;
                }
                for word in self.tail.drain(..from_tail) {
                    write!(out, " 0x{word:016X};")?;
                }
                writeln!(out)?;
                self.line_start += WORDS_PER_LINE;
                self.run -= from_run;
            } else {
                return Ok(());
            }
            if self.run == 0 {
                // Whatever is left begins the next line; it is shorter than one.
                for word in std::mem::take(&mut self.tail) {
                    if self.run == 0 {
                        self.head = word;
                    }
                    if self.tail.is_empty() && word == self.head {
                        self.run += 1;
                    } else {
                        self.tail.push(word);
                    }
                }
                return Ok(());
            }
        }
    }

    fn comment(&self, out: &mut dyn Write) -> io::Result<()> {
        if self.line_start.is_multiple_of(WORDS_PER_COMMENT) {
            writeln!(out, "   # at {}kB", self.line_start * KIB_PER_WORD)?;
        }
        Ok(())
    }

    /// Writes the rest and the closing lines. Returns the number of bits that are set.
    ///
    /// # Errors
    /// Those of `out`.
    pub fn finish(mut self, out: &mut dyn Write) -> io::Result<u64> {
        self.emit(out, true)?;
        // Only an area that is no multiple of a line leaves words here.
        if self.run > 0 || !self.tail.is_empty() {
            self.comment(out)?;
            write!(out, "   ")?;
            for word in
                std::iter::repeat_n(self.head, usize::try_from(self.run).unwrap_or(0)).chain(self.tail)
            {
                write!(out, " 0x{word:016X};")?;
            }
            writeln!(out)?;
        }
        writeln!(out, "}}\n# bits-set {};", self.bits_set)?;
        Ok(self.bits_set)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn body(words: &[u64]) -> String {
        let mut out = Vec::new();
        let mut dump = BitmapDump::default();
        dump.push(&mut out, words).unwrap();
        dump.finish(&mut out).unwrap();
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn runs_of_eight_are_counted_in_whole_lines() {
        let mut words = vec![1, 2];
        words.extend([u64::MAX; 13]);
        words.push(5);
        assert_eq!(
            body(&words),
            "   # at 0kB\n    0x0000000000000001; 0x0000000000000002; 0xFFFFFFFFFFFFFFFF; 0xFFFFFFFFFFFFFFFF;\n    \
             8 times 0xFFFFFFFFFFFFFFFF;\n    0xFFFFFFFFFFFFFFFF; 0xFFFFFFFFFFFFFFFF; 0xFFFFFFFFFFFFFFFF; \
             0x0000000000000005;\n}\n# bits-set 836;\n"
        );
    }

    #[test]
    fn an_area_that_is_no_multiple_of_a_line_ends_in_a_short_one() {
        assert_eq!(
            body(&[1, 2, 3]),
            "   # at 0kB\n    0x0000000000000001; 0x0000000000000002; 0x0000000000000003;\n}\n# bits-set 4;\n"
        );
        let mut words = vec![u64::MAX; 9];
        words.push(6);
        let text = body(&words);
        assert!(text.ends_with(" 0xFFFFFFFFFFFFFFFF; 0x0000000000000006;\n}\n# bits-set 578;\n"), "{text}");
    }

    #[test]
    fn a_word_of_unequal_halves_is_never_counted() {
        let text = body(&[3; 64]);
        assert!(!text.contains("times"));
        assert_eq!(text.matches("0x0000000000000003;").count(), 64);
        assert!(text.contains("   # at 8192kB\n"));
    }

    #[test]
    fn holes_pushed_as_runs_print_like_words() {
        let mut words = vec![7; 3];
        words.extend([0; 100]);
        words.extend([9; 9]);
        let mut out = Vec::new();
        let mut dump = BitmapDump::default();
        dump.push(&mut out, &[7, 7, 7]).unwrap();
        dump.push_run(&mut out, 0, 60).unwrap();
        dump.push_run(&mut out, 0, 40).unwrap();
        dump.push_run(&mut out, 9, 9).unwrap();
        assert_eq!(dump.finish(&mut out).unwrap(), 9 + 18);
        assert_eq!(String::from_utf8(out).unwrap(), body(&words));
    }
}
