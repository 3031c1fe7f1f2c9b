//! Option data of a client, parsed. Pure: a slice in, a value or "malformed" out.
use super::wire::{MAX_STRING_BYTES, info};

/// The option's data does not follow the protocol; the text says where.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Malformed(pub(super) &'static str);

/// Data of INFO and GO.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct InfoRequest<'a> {
    /// Export name; may be empty.
    pub(super) name: &'a str,
    /// The canonical name was asked for.
    pub(super) wants_name: bool,
    /// The description was asked for.
    pub(super) wants_description: bool,
}

/// Data of LIST_META_CONTEXT and SET_META_CONTEXT.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct MetaRequest<'a> {
    /// Export name; may be empty.
    pub(super) name: &'a str,
    /// The queries, in order.
    pub(super) queries: Vec<&'a str>,
}

/// Parses the data of INFO or GO.
pub(super) fn info_request(data: &[u8]) -> Result<InfoRequest<'_>, Malformed> {
    let mut fields = Fields(data);
    let name = fields.string("export name")?;
    let count = fields.u16("number of information requests")?;
    let mut request = InfoRequest { name, wants_name: false, wants_description: false };
    for _ in 0..count {
        match fields.u16("information request")? {
            info::NAME => request.wants_name = true,
            info::DESCRIPTION => request.wants_description = true,
            // Size and block sizes are always sent; kinds not known here are left out, as the protocol asks.
            _ => {}
        }
    }
    fields.end()?;
    Ok(request)
}

/// Parses the data of LIST_META_CONTEXT or SET_META_CONTEXT.
pub(super) fn meta_request(data: &[u8]) -> Result<MetaRequest<'_>, Malformed> {
    let mut fields = Fields(data);
    let name = fields.string("export name")?;
    let count = fields.u32("number of queries")?;
    // No capacity from `count`: it is the client's claim. The data's length bounds the loop.
    let mut queries = Vec::new();
    for _ in 0..count {
        queries.push(fields.string("query")?);
    }
    fields.end()?;
    Ok(MetaRequest { name, queries })
}

/// A string of the protocol: UTF-8, no NUL, at most 4096 bytes.
pub(super) fn string<'a>(bytes: &'a [u8], what: &'static str) -> Result<&'a str, Malformed> {
    if bytes.len() > MAX_STRING_BYTES || bytes.contains(&0) {
        return Err(Malformed(what));
    }
    std::str::from_utf8(bytes).map_err(|_| Malformed(what))
}

/// Takes big-endian fields from the front.
struct Fields<'a>(&'a [u8]);

impl<'a> Fields<'a> {
    fn u16(&mut self, what: &'static str) -> Result<u16, Malformed> {
        let (head, rest) = self.0.split_first_chunk().ok_or(Malformed(what))?;
        self.0 = rest;
        Ok(u16::from_be_bytes(*head))
    }

    fn u32(&mut self, what: &'static str) -> Result<u32, Malformed> {
        let (head, rest) = self.0.split_first_chunk().ok_or(Malformed(what))?;
        self.0 = rest;
        Ok(u32::from_be_bytes(*head))
    }

    fn string(&mut self, what: &'static str) -> Result<&'a str, Malformed> {
        let length = usize::try_from(self.u32(what)?).map_err(|_| Malformed(what))?;
        let (head, rest) = self.0.split_at_checked(length).ok_or(Malformed(what))?;
        self.0 = rest;
        string(head, what)
    }

    fn end(&self) -> Result<(), Malformed> {
        if self.0.is_empty() { Ok(()) } else { Err(Malformed("length: bytes are left over")) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sized(text: &str) -> Vec<u8> {
        let mut data = u32::try_from(text.len()).unwrap().to_be_bytes().to_vec();
        data.extend_from_slice(text.as_bytes());
        data
    }

    #[test]
    fn info_request_names_what_is_wanted() {
        let mut data = sized("web-root/0");
        data.extend_from_slice(&[0, 3, 0, 1, 0, 2, 0, 99]);
        let request = info_request(&data).unwrap();
        assert_eq!(request, InfoRequest { name: "web-root/0", wants_name: true, wants_description: true });
    }

    #[test]
    fn every_truncation_and_every_extra_byte_is_malformed() {
        let mut data = sized("r0");
        data.extend_from_slice(&[0, 1, 0, 3]);
        for length in 0..data.len() {
            assert!(info_request(&data[..length]).is_err(), "{length} bytes");
        }
        data.push(0);
        assert!(info_request(&data).is_err());

        let mut data = sized("r0");
        data.extend_from_slice(&1u32.to_be_bytes());
        data.extend_from_slice(&sized("base:allocation"));
        assert_eq!(meta_request(&data).unwrap().queries, ["base:allocation"]);
        for length in 0..data.len() {
            assert!(meta_request(&data[..length]).is_err(), "{length} bytes");
        }
    }

    #[test]
    fn a_claim_of_four_billion_queries_allocates_nothing() {
        let mut data = sized("");
        data.extend_from_slice(&u32::MAX.to_be_bytes());
        assert!(meta_request(&data).is_err());
    }

    #[test]
    fn strings_are_utf8_without_nul_and_not_endless() {
        assert!(string(b"a\0b", "x").is_err());
        assert!(string(&[0xff], "x").is_err());
        assert!(string(&vec![b'a'; MAX_STRING_BYTES], "x").is_ok());
        assert!(string(&vec![b'a'; MAX_STRING_BYTES + 1], "x").is_err());
    }
}
