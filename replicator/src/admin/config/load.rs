//! Files: where the configuration is looked for, what `include` brings in, and the whole way from bytes to [`Config`].
use super::diagnostics::{Diagnostic, Problem, Sink};
use super::model::{Config, Sections};
use super::options::{OptionSet, Section};
use super::read::{Reader, Seen, once};
use super::resolve::{Entry, resolve};
use super::source::{Sources, Span};
use super::tree::{self, Node, RawConfig};
use std::collections::BTreeSet;
use std::io::Read as _;
use std::path::{Path, PathBuf};

/// Looked for in this order when no file is named.
pub const SEARCH: &[&str] = &[
    "/etc/drbd-90.conf",
    "/etc/drbd-84.conf",
    "/etc/drbd-83.conf",
    "/etc/drbd-82.conf",
    "/etc/drbd-08.conf",
    "/etc/drbd.conf",
];
/// Files inside files at most.
const INCLUDE_DEPTH_MAX: usize = 10;
/// Largest file, bytes; a configuration has some KiB.
const FILE_MAX: u64 = 64 << 20;

/// Where included files come from.
pub trait Loader {
    /// The files that a pattern names, sorted, as paths that [`Loader::read`] takes. `pattern` is absolute or relative
    /// to the directory of the file `from`. A name without wildcards is returned as it is, existing or not.
    fn find(&self, from: &str, pattern: &str) -> Vec<String>;

    /// What makes two names the same file (the real path).
    fn identity(&self, path: &str) -> String;

    /// The bytes of a file.
    ///
    /// # Errors
    /// What the system says.
    fn read(&self, path: &str) -> std::io::Result<Vec<u8>>;
}

/// Files of this machine.
#[derive(Debug)]
pub struct Filesystem;

impl Loader for Filesystem {
    fn find(&self, from: &str, pattern: &str) -> Vec<String> {
        let base = Path::new(from).parent().map(Path::to_path_buf).unwrap_or_default();
        super::glob::expand(&base, pattern).into_iter().map(|p| p.to_string_lossy().into_owned()).collect()
    }

    fn identity(&self, path: &str) -> String {
        std::fs::canonicalize(path).map_or_else(|_| path.to_owned(), |p| p.to_string_lossy().into_owned())
    }

    fn read(&self, path: &str) -> std::io::Result<Vec<u8>> {
        let mut bytes = Vec::new();
        std::fs::File::open(path)?.take(FILE_MAX + 1).read_to_end(&mut bytes)?;
        if bytes.len() as u64 > FILE_MAX {
            return Err(std::io::Error::other("the file is larger than 64 MiB"));
        }
        Ok(bytes)
    }
}

/// No files at all: every `include` of a plain name is an error.
#[derive(Debug)]
struct Nothing;

impl Loader for Nothing {
    fn find(&self, _: &str, pattern: &str) -> Vec<String> {
        if pattern.contains(['*', '?', '[']) { Vec::new() } else { vec![pattern.to_owned()] }
    }

    fn identity(&self, path: &str) -> String {
        path.to_owned()
    }

    fn read(&self, _: &str) -> std::io::Result<Vec<u8>> {
        Err(std::io::ErrorKind::NotFound.into())
    }
}

/// A configuration with its warnings, or everything that is wrong with it.
pub type Outcome = Result<(Config, Vec<Diagnostic>), Vec<Diagnostic>>;

/// Reads the configuration: the named file, `-` for standard input, or the first of [`SEARCH`].
///
/// # Errors
/// Everything that is wrong with it, warnings among the errors, in order of place.
pub fn load(path: Option<&Path>) -> Outcome {
    let cannot = |path: &Path, why: &dyn std::fmt::Display| {
        vec![Diagnostic::without_place(format!("Can not open '{}': {why}", path.display()))]
    };
    if path == Some(Path::new("-")) {
        let mut bytes = Vec::new();
        let limited = std::io::stdin().lock().take(FILE_MAX).read_to_end(&mut bytes);
        limited.map_err(|e| cannot(Path::new("-"), &e))?;
        return parse_with("STDIN", bytes, &Filesystem);
    }
    let default =
        || SEARCH.iter().map(PathBuf::from).find(|p| p.exists()).unwrap_or_else(|| "/etc/drbd.conf".into());
    let path = path.map_or_else(default, Path::to_path_buf);
    if path.is_dir() {
        return Err(cannot(&path, &"it is a directory"));
    }
    let name = path.to_string_lossy();
    let bytes = Filesystem.read(&name).map_err(|e| cannot(&path, &e))?;
    parse_with(&name, bytes, &Filesystem)
}

/// Reads a configuration from memory; it cannot include anything.
///
/// # Errors
/// As [`load`].
pub fn parse_bytes(name: &str, bytes: &[u8]) -> Outcome {
    parse_with(name, bytes.to_vec(), &Nothing)
}

/// Reads a configuration from memory; included files come from `loader`.
///
/// # Errors
/// As [`load`].
pub fn parse_with(name: &str, bytes: Vec<u8>, loader: &dyn Loader) -> Outcome {
    let mut top = Top {
        loader,
        sources: Sources::default(),
        sink: Sink::default(),
        warned: BTreeSet::new(),
        read: BTreeSet::from([loader.identity(name)]),
        seen: Seen::new(),
        global: OptionSet::default(),
        common: Sections::default(),
        entries: Vec::new(),
        shape_errors: 0,
    };
    let Some(file) = top.sources.add(name, bytes) else {
        return Err(vec![Diagnostic::without_place(format!("'{name}' is too large"))]);
    };
    top.file(file, 0);
    let Top { sources, mut sink, global, common, entries, .. } = top;
    let resources = resolve(entries, &common, &sources, &mut sink);
    let failed = sink.has_errors();
    let diagnostics = sink.finish(&sources);
    if failed {
        return Err(diagnostics);
    }
    Ok((Config { files: sources.names(), global, common, resources }, diagnostics))
}

struct Top<'a> {
    loader: &'a dyn Loader,
    sources: Sources,
    sink: Sink,
    warned: BTreeSet<&'static str>,
    /// Identities of all files read: each is read once.
    read: BTreeSet<String>,
    seen: Seen,
    global: OptionSet,
    common: Sections,
    entries: Vec<Entry>,
    /// Errors in braces and semicolons: they can hide any statement.
    shape_errors: usize,
}

const TOP_WORDS: &[&str] = &["global", "common", "resource", "include", "skip"];

impl Top<'_> {
    fn file(&mut self, file: u32, depth: usize) {
        let before = self.sink.errors();
        let raw = tree::parse(&self.sources, file, &mut self.sink);
        self.shape_errors += self.sink.errors() - before;
        for node in raw.nodes.iter().filter(|n| !n.bad || n.block.is_some()) {
            self.node(&raw, node, file, depth);
        }
    }

    fn node(&mut self, raw: &RawConfig, node: &Node, file: u32, depth: usize) {
        let mut r = Reader { sources: &self.sources, raw, sink: &mut self.sink, warned: &mut self.warned };
        let words = r.words(node);
        let texts = r.texts(node);
        let keyword = texts.first().map_or("", |t| t);
        match keyword {
            "global" => {
                once(r.sink, &mut self.seen, "section", "global", node.span);
                if let Some(nodes) = r.block(node) {
                    r.one_set(nodes, &[Section::Global], "global", &mut self.global);
                }
            }
            "common" => {
                once(r.sink, &mut self.seen, "resource section", "common", node.span);
                if let Some(nodes) = r.block(node) {
                    self.common = r.common(nodes);
                }
            }
            "resource" => {
                let Some(name) = texts.get(1) else {
                    return r.error(node.span.after(), "expected the name of the resource");
                };
                let span = words[1].span;
                if name == "all" || name == "common" {
                    r.hinted(
                        span,
                        (format!("'{name}' is reserved"), "choose another name for the resource".into()),
                    );
                } else if name.is_empty()
                    || name.contains(|c: char| c.is_whitespace() || c == '/' || c.is_control())
                {
                    let hint = "use letters, digits and '+ - . _'".into();
                    r.hinted(span, (format!("'{name}' cannot be the name of a resource"), hint));
                }
                if let Some(extra) = words.get(2) {
                    r.error(extra.span, "expected '{' here");
                }
                once(r.sink, &mut self.seen, "resource section", &format!("resource {name}"), span);
                let Some(nodes) = r.block(node) else { return };
                let before = r.sink.errors();
                let decl = r.resource(nodes, name);
                let broken = r.sink.errors() > before || self.shape_errors > 0;
                self.entries.push(Entry { name: name.clone(), span, decl, broken });
            }
            "include" => {
                if r.arity(node, &words, 1) {
                    self.include(&texts[1], words[1].span, file, depth);
                }
            }
            _ if is_require(keyword) => {
                if r.arity(node, &words, 1) && !texts[1].split('.').all(|p| p.parse::<u16>().is_ok()) {
                    r.error(words[1].span, "this is not a version");
                }
            }
            _ => r.unexpected(node, "the file", TOP_WORDS),
        }
    }

    fn include(&mut self, pattern: &str, span: Span, from: u32, depth: usize) {
        if depth >= INCLUDE_DEPTH_MAX {
            let message = "files are included too deep";
            return self.sink.push(
                Problem::error(span, message).hint(format!("{INCLUDE_DEPTH_MAX} levels are the limit")),
            );
        }
        for path in self.loader.find(self.sources.name(from), pattern) {
            if !self.read.insert(self.loader.identity(&path)) {
                continue;
            }
            match self.loader.read(&path) {
                Ok(bytes) => match self.sources.add(&path, bytes) {
                    Some(file) => self.file(file, depth + 1),
                    None => {
                        self.sink.push(Problem::error(span, format!("include file '{path}' is too large")));
                    }
                },
                Err(e) => {
                    self.sink
                        .push(Problem::error(span, format!("Failed to open include file '{path}': {e}")));
                }
            }
        }
    }
}

fn is_require(keyword: &str) -> bool {
    let operator = keyword.strip_prefix("require-drbd-module-version-");
    operator.is_some_and(|o| matches!(o, "eq" | "ne" | "gt" | "ge" | "lt" | "le"))
}
