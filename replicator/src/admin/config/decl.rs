//! Statements as they were written, but typed: between the tree and the resolved model. `dump` prints these.
use super::model::{Address, Device, MetaDisk, Sections};
use super::options::OptionSet;
use super::source::Span;
use std::path::PathBuf;

/// A value and where it stands. Equal when the values are: places do not count.
#[derive(Clone, Debug)]
pub(crate) struct At<T> {
    pub(crate) value: T,
    pub(crate) span: Span,
}

impl<T: PartialEq> PartialEq for At<T> {
    fn eq(&self, other: &Self) -> bool {
        self.value == other.value
    }
}

#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct ResourceDecl {
    pub(crate) volumes: Vec<VolumeDecl>,
    pub(crate) hosts: Vec<HostDecl>,
    pub(crate) connections: Vec<ConnectionDecl>,
    pub(crate) meshes: Vec<MeshDecl>,
    pub(crate) sections: Sections,
    pub(crate) template_file: Option<String>,
}

#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct VolumeDecl {
    pub(crate) nr: u16,
    /// Written without a `volume` block.
    pub(crate) implicit: bool,
    pub(crate) span: Place,
    pub(crate) device: Option<At<Device>>,
    /// `Some(None)` is `disk none`.
    pub(crate) disk: Option<At<Option<PathBuf>>>,
    pub(crate) meta_disk: Option<At<MetaDisk>>,
    pub(crate) tiebreaker: Option<bool>,
    pub(crate) options: OptionSet,
}

/// A span that never makes a difference.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Place(pub(crate) Span);

impl PartialEq for Place {
    fn eq(&self, _: &Self) -> bool {
        true
    }
}

#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) enum HostKind {
    #[default]
    On,
    Floating,
    /// Name of the lower resource.
    StackedOnTopOf(String),
}

#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct HostDecl {
    pub(crate) kind: HostKind,
    pub(crate) names: Vec<String>,
    pub(crate) span: Place,
    pub(crate) node_id: Option<At<u32>>,
    pub(crate) address: Option<At<Address>>,
    pub(crate) volumes: Vec<VolumeDecl>,
    pub(crate) disk: OptionSet,
    pub(crate) options: OptionSet,
    pub(crate) lockstep: OptionSet,
    pub(crate) proxy: Vec<ProxyDecl>,
}

#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct ProxyDecl {
    pub(crate) hosts: Vec<String>,
    pub(crate) inside: Option<At<Address>>,
    pub(crate) outside: Option<At<Address>>,
}

#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct PathHost {
    pub(crate) name: String,
    pub(crate) span: Place,
    pub(crate) address: Option<At<Address>>,
    pub(crate) port: Option<u16>,
}

#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct ConnectionDecl {
    pub(crate) span: Place,
    pub(crate) hosts: Vec<PathHost>,
    pub(crate) paths: Vec<Vec<PathHost>>,
    pub(crate) net: OptionSet,
    pub(crate) disk: OptionSet,
    pub(crate) volumes: Vec<(u16, OptionSet)>,
}

#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct MeshDecl {
    pub(crate) span: Place,
    pub(crate) hosts: Vec<At<String>>,
    pub(crate) net: OptionSet,
}
