//! Values inside statements: numbers with suffixes, addresses, devices (ADM §1.2, §1.3).
use super::model::{Address, Device, Family, MetaDisk};
use super::options::{Kind, Unit};
use std::net::IpAddr;
use winnow::ascii::digit1;
use winnow::combinator::{alt, delimited, eof, opt, preceded, terminated};
use winnow::prelude::*;
use winnow::token::{one_of, take_till};

/// `40M` in `unit`; the error is a message and a hint.
pub(crate) fn number(text: &str, unit: Unit) -> Result<u64, (String, String)> {
    let mut parser =
        terminated((digit1::<_, winnow::error::EmptyError>, opt(one_of(('a'..='z', 'A'..='Z')))), eof);
    let range_hint = || "write a whole number, with K, M, G or s (sectors) behind it for a size".to_owned();
    let Ok((digits, suffix)) = parser.parse(text) else {
        return Err((format!("'{text}' is not a number"), range_hint()));
    };
    let too_big = || (format!("'{text}' is too big"), String::new());
    let value: u64 = digits.parse().map_err(|_| too_big())?;
    let Some(suffix) = suffix else { return Ok(value) };
    let factor: u64 = match suffix {
        'k' | 'K' => 1 << 10,
        'm' | 'M' => 1 << 20,
        'g' | 'G' => 1 << 30,
        's' | 'S' => 512,
        _ => return Err((format!("'{suffix}' is not a suffix of a number"), range_hint())),
    };
    let Some(unit_bytes) = unit.bytes() else {
        // DRBD would take `1s` for 512 units here; nobody who writes it means that.
        if unit == Unit::Count && factor != 512 {
            return value.checked_mul(factor).ok_or_else(too_big);
        }
        let what = unit.name();
        let hint = if what.is_empty() {
            "write the bare number".into()
        } else {
            format!("the unit is{}; write the bare number", what.trim_start_matches(" x"))
        };
        return Err((format!("the suffix '{suffix}' has no meaning here"), hint));
    };
    let bytes = value.checked_mul(factor).ok_or_else(too_big)?;
    if bytes % unit_bytes != 0 {
        return Err((format!("'{text}' is not a multiple of{}", one(unit)), String::new()));
    }
    Ok(bytes / unit_bytes)
}

fn one(unit: Unit) -> &'static str {
    match unit {
        Unit::Sectors => " 512 bytes",
        Unit::KibPerSecond => " 1 KiB/s",
        _ => " 1",
    }
}

/// "1..600 x 0.1 s", for messages.
pub(crate) fn range_text(kind: Kind) -> String {
    match kind {
        Kind::Number { unit, min, max, .. } => format!("{min}..{max}{}", unit.name()),
        Kind::Choice { values, .. } => values.join(", "),
        Kind::Quorum => "off, majority, all, 1..32".into(),
        Kind::Bool { .. } => "yes, no".into(),
        Kind::Text { max_len } => format!("up to {max_len} characters"),
        Kind::ResourceRef => "RESOURCE, RESOURCE/VOLUME or a minor number".into(),
        Kind::Words => "words".into(),
    }
}

/// `10.1.1.31:7789` or `[fd00::1%eth0]:7789` (blanks already removed).
pub(crate) fn address(family: Option<&str>, text: &str) -> Result<Address, (String, String)> {
    let shape = || {
        let bad = if text.is_empty() {
            "an address is missing".to_owned()
        } else {
            format!("'{text}' is not an address")
        };
        (bad, "write it as 10.1.1.31:7789 or ipv6 [fd00::1]:7789".to_owned())
    };
    let host = alt((delimited('[', take_till(1.., ']'), ']'), take_till(1.., (':', '['))));
    let mut parser = (host, opt(preceded(':', digit1::<_, winnow::error::EmptyError>)));
    let (host, port): (&str, Option<&str>) = parser.parse(text).map_err(|_| shape())?;
    let (ip, scope) = host.split_once('%').map_or((host, None), |(ip, s)| (ip, Some(s.to_owned())));
    let ip: IpAddr = ip.parse().map_err(|_| shape())?;
    let Some(port) = port else {
        return Err((format!("the port is missing after '{text}'"), format!("write {text}:7789")));
    };
    let port = port.parse().ok().filter(|p| *p != 0);
    let Some(port) = port else {
        return Err(("the port is out of range".into(), "ports are 1..65535".into()));
    };
    let family = match (family, ip) {
        (None | Some("ipv4"), IpAddr::V4(_)) => Family::Ipv4,
        (None | Some("ipv6"), IpAddr::V6(_)) => Family::Ipv6,
        (Some("ssocks"), IpAddr::V4(_)) => Family::Ssocks,
        (Some("sci"), IpAddr::V4(_)) => Family::Sci,
        (Some("sdp"), IpAddr::V4(_)) => Family::Sdp,
        (Some(f), _) => return Err((format!("'{text}' is not an address of family '{f}'"), String::new())),
    };
    if scope.is_some() && ip.is_ipv4() {
        return Err(shape());
    }
    Ok(Address { family, ip, scope, port })
}

/// Largest minor number of a block device in Linux.
const MINOR_MAX: u32 = (1 << 20) - 1;

/// `/dev/drbd0`, `drbd0 minor 0`, `minor 0`, `/dev/drbd_name minor 0`.
pub(crate) fn device(words: &[&str]) -> Result<Device, (String, String)> {
    let minor_of = |text: &str| {
        text.parse::<u32>().ok().filter(|m| *m <= MINOR_MAX).ok_or_else(|| {
            (format!("'{text}' is not a minor number"), format!("minor numbers are 0..{MINOR_MAX}"))
        })
    };
    let (name, minor) = match words {
        ["minor", n] => (None, Some(minor_of(n)?)),
        [name] => (Some(*name), None),
        [name, "minor", n] => (Some(*name), Some(minor_of(n)?)),
        _ => return Err(("this is not a device".into(), "write /dev/drbd0, or minor 0, or both".into())),
    };
    let Some(name) = name else { return Ok(Device { name: None, minor: minor.unwrap_or(0) }) };
    let tail = name.strip_prefix("/dev/").unwrap_or(name).strip_prefix("drbd");
    let Some(tail) = tail.filter(|t| !t.contains('/')) else {
        return Err((
            format!("the device name '{name}' does not start with /dev/drbd"),
            "write /dev/drbd0".into(),
        ));
    };
    let minor = match (tail.starts_with('_'), minor) {
        (true, Some(minor)) => minor,
        (true, None) => {
            return Err((format!("no minor number for '{name}'"), format!("write device {name} minor 0;")));
        }
        (false, given) => {
            let named = minor_of(tail).map_err(|_| {
                (format!("'{name}' has no number"), "write /dev/drbd0, or /dev/drbd_name minor 0".to_owned())
            })?;
            if given.is_some_and(|g| g != named) {
                return Err((
                    format!("the minor number does not match the name '{name}'"),
                    format!(
                        "write device {name}; or device /dev/drbd{} minor {};",
                        given.unwrap_or(0),
                        given.unwrap_or(0)
                    ),
                ));
            }
            named
        }
    };
    Ok(Device { name: Some(format!("/dev/drbd{tail}")), minor })
}

/// `internal`, `PATH`, `PATH[INDEX]`.
pub(crate) fn meta_disk(words: &[&str]) -> Result<MetaDisk, (String, String)> {
    match words {
        ["internal"] => Ok(MetaDisk::Internal),
        [path] => Ok(MetaDisk::External { path: (*path).into() }),
        [path, "[", index, "]"] => match index.parse::<u32>() {
            Ok(index) if index <= 10_000 => Ok(MetaDisk::Indexed { path: (*path).into(), index }),
            _ => Err((format!("'{index}' is not an index"), "indexes count slots of 128 MiB from 0".into())),
        },
        _ => Err(("this is not a place for metadata".into(), "write internal, PATH or PATH[INDEX]".into())),
    }
}
