//! One program, five names: which one was called, and with what.
use crate::admin::cli::{
    DrbdadmCli, DrbdsetupCli, GlobalOptions, LockstepCli, LockstepCommand, LockstepdCli, Verb, normalise,
};
use crate::admin::verbs::Session;
use crate::admin::{daemon, drbdmeta, links, outcome, setup};
use clap::Parser;
use std::ffi::{OsStr, OsString};
use std::io::{self, Write};
use std::path::Path;

/// What `drbdadm --version` prints, to be evaluated by a shell: cluster agents take the version of
/// the module to decide which commands there are (ADM §3.1, §9.1). lockstep claims the DRBD release
/// whose surface it follows.
const DRBDADM_VERSION: &str = "\
DRBDADM_BUILDTAG=lockstep
DRBDADM_API_VERSION=2
DRBD_KERNEL_VERSION_CODE=0x090200
DRBD_KERNEL_VERSION=9.2.0
DRBDADM_VERSION_CODE=0x091600
DRBDADM_VERSION=9.22.0
";

/// Runs the program that `args` call: the first is its name. Answers the exit code.
#[must_use]
pub fn run(args: Vec<OsString>) -> u8 {
    let mut args = args.into_iter();
    let path = args.next().unwrap_or_else(|| "lockstep".into());
    let name = Path::new(&path).file_name().and_then(OsStr::to_str).unwrap_or("lockstep").to_owned();
    let rest: Vec<OsString> = args.collect();
    match name.as_str() {
        "lockstepd" => lockstepd(rest),
        "drbdadm" => drbdadm(rest),
        "drbdsetup" => drbdsetup(rest),
        "drbdmeta" => meta(&rest),
        _ => lockstep(rest),
    }
}

/// Parses, or says what is wrong; the error is the exit code.
fn parse<T: Parser>(name: &str, args: Vec<OsString>) -> Result<T, u8> {
    T::try_parse_from(std::iter::once(OsString::from(name)).chain(args)).map_err(|error| {
        let _gone = error.print();
        // Help and versions were asked for. drbdadm's code for every other usage error is 1, not clap's 2.
        if error.use_stderr() { outcome::USAGE } else { outcome::OK }
    })
}

fn lockstep(args: Vec<OsString>) -> u8 {
    // The other programs' arguments are theirs, option order included.
    match args.first().and_then(|first| first.to_str()) {
        Some("drbdmeta") => return meta(&args[1..]),
        Some("drbdsetup") => return drbdsetup(args.into_iter().skip(1).collect()),
        _ => {}
    }
    let cli: LockstepCli = match parse("lockstep", normalise(args)) {
        Ok(cli) => cli,
        Err(code) => return code,
    };
    match cli.command {
        LockstepCommand::Daemon(options) => serve(&cli.global, &options),
        LockstepCommand::Drbdmeta { args } => meta(&args),
        LockstepCommand::Drbdsetup { args } => drbdsetup(args),
        LockstepCommand::InstallLinks { dir, force } => install(&dir, force),
        LockstepCommand::Verb(verb) => verb_of(&cli.global, &verb),
    }
}

fn lockstepd(args: Vec<OsString>) -> u8 {
    match parse::<LockstepdCli>("lockstepd", args) {
        Ok(cli) => serve(&cli.global, &cli.daemon),
        Err(code) => code,
    }
}

fn drbdadm(args: Vec<OsString>) -> u8 {
    let cli: DrbdadmCli = match parse("drbdadm", normalise(args)) {
        Ok(cli) => cli,
        Err(code) => return code,
    };
    match cli.verb {
        _ if cli.version => {
            let _gone = io::stdout().write_all(DRBDADM_VERSION.as_bytes());
            outcome::OK
        }
        Some(verb) => verb_of(&cli.global, &verb),
        None => {
            let _gone = writeln!(io::stderr(), "drbdadm: no verb; see drbdadm --help");
            outcome::USAGE
        }
    }
}

fn drbdsetup(args: Vec<OsString>) -> u8 {
    match parse::<DrbdsetupCli>("drbdsetup", args) {
        Ok(cli) => {
            let (mut out, mut err) = (io::stdout(), io::stderr());
            setup::run(&mut Session::new(&cli.global, &mut out, &mut err), &cli.command)
        }
        Err(code) => code,
    }
}

fn verb_of(global: &GlobalOptions, verb: &Verb) -> u8 {
    let (mut out, mut err) = (io::stdout(), io::stderr());
    Session::new(global, &mut out, &mut err).run(verb)
}

fn serve(global: &GlobalOptions, options: &crate::admin::cli::DaemonOptions) -> u8 {
    match daemon::run(global, options) {
        Ok(()) => outcome::OK,
        Err(failure) => {
            let _gone = io::stderr().write_all(failure.text.as_bytes());
            failure.exit
        }
    }
}

fn meta(args: &[OsString]) -> u8 {
    drbdmeta::run_to(args, &mut io::stdout(), &mut io::stderr())
}

fn install(dir: &Path, force: bool) -> u8 {
    let made = std::env::current_exe()
        .map_err(|error| error.to_string())
        .and_then(|program| links::install(&program, dir, force).map_err(|error| error.to_string()));
    let (code, text) = match made {
        Ok(made) => {
            let names: Vec<String> = made.iter().map(|link| link.display().to_string()).collect();
            (outcome::OK, format!("made {}", names.join(" ")))
        }
        Err(error) => (outcome::EXEC, format!("install-links: {error}")),
    };
    let _gone = writeln!(io::stderr(), "{text}");
    code
}
