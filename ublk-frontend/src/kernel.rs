//! Kernels that must not be asked to add a ublk device.
//!
//! The listed builds crash in ADD_DEV, so there is no trying it out. The list is short and exact: a build that is not on it
//! is trusted, and the feature mask of the driver decides the rest.

/// Why this release is refused, if it is.
pub(crate) fn known_bad(release: &str) -> Option<&'static str> {
    const OOPS: &str = "adding a ublk device crashes it";
    let mut parts = release.splitn(3, '-');
    let version = parts.next().unwrap_or_default();
    let abi: Option<u32> = parts.next().and_then(|text| text.parse().ok());
    let flavour = parts.next().unwrap_or_default();

    match (version, abi) {
        ("6.18.4" | "6.18.5", _) => Some(OOPS),
        // Ubuntu numbers: version-abi-flavour. Cloud kernels count their own.
        ("6.17.0", Some(abi)) => {
            let bad = match flavour {
                "aws" => abi == 1019,
                "azure" => (1015..=1020).contains(&abi),
                _ => matches!(abi, 35 | 38 | 40),
            };
            bad.then_some(OOPS)
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bad_builds_are_refused() {
        for release in [
            "6.18.4",
            "6.18.5-arch1-1",
            "6.18.5-061805-generic",
            "6.17.0-35-generic",
            "6.17.0-38-generic",
            "6.17.0-40-lowlatency",
            "6.17.0-1019-aws",
            "6.17.0-1015-azure",
            "6.17.0-1020-azure",
        ] {
            assert!(known_bad(release).is_some(), "{release}");
        }
    }

    #[test]
    fn their_neighbours_are_not() {
        for release in [
            "6.12.117+deb12-amd64",
            "6.18.3",
            "6.18.6",
            "6.18.44-custom",
            "6.17.0",
            "6.17.0-36-generic",
            "6.17.0-1018-aws",
            "6.17.0-1021-azure",
            "6.17.0-1019-gcp",
            "7.1.0",
            "",
        ] {
            assert_eq!(known_bad(release), None, "{release}");
        }
    }
}
