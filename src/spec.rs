//! What plans record of a plugin, and plugins by what plans record: names with settings.

use std::collections::BTreeMap;
use std::fmt::{self, Display};
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result, shown};

/// A plugin with its settings, as plans hold it: enough to make it again.
///
/// Serialised as one flat object, `{"name": "low-rank", "ridge": 0.01}`.
///
/// ```
/// use qcqa::spec::Spec;
///
/// let spec = Spec::new("low-rank").with("ridge", 0.01);
/// assert_eq!(spec.to_string(), "low-rank (ridge 0.01)");
/// assert_eq!(spec.number("ridge").unwrap(), Some(0.01));
/// assert_eq!("low-rank:ridge=0.01".parse::<Spec>().unwrap(), spec);
/// ```
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct Spec {
    name: String,
    #[serde(flatten)]
    settings: BTreeMap<String, Setting>,
}

/// The value of one setting.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
#[non_exhaustive]
pub enum Setting {
    /// Yes or no.
    Flag(bool),
    /// A whole number from 0 on.
    Count(u64),
    /// Any other number.
    Number(f64),
    /// A name.
    Text(String),
}

impl Spec {
    /// A plugin without settings.
    pub fn new(name: impl Into<String>) -> Self {
        Self { name: name.into(), settings: BTreeMap::new() }
    }

    /// Adds a setting, or replaces it.
    pub fn with(mut self, key: &str, value: impl Into<Setting>) -> Self {
        self.settings.insert(key.to_string(), value.into());
        self
    }

    /// The name by which a [`Registry`] knows the plugin.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// All settings.
    pub fn settings(&self) -> impl Iterator<Item = (&str, &Setting)> {
        self.settings.iter().map(|(key, value)| (key.as_str(), value))
    }

    /// A setting that is a whole number; `None` where it is not given.
    ///
    /// # Errors
    /// [`Error::Setting`] when it is anything else.
    pub fn count(&self, key: &'static str) -> Result<Option<usize>> {
        let wrong = |value: &Setting| Error::setting(key, value, "a whole number from 0 on");
        self.settings.get(key).map_or(Ok(None), |value| match *value {
            Setting::Count(n) => usize::try_from(n).map(Some).map_err(|_| wrong(value)),
            _ => Err(wrong(value)),
        })
    }

    /// A setting that is a number; `None` where it is not given.
    ///
    /// # Errors
    /// [`Error::Setting`] when it is anything else, or not finite.
    pub fn number(&self, key: &'static str) -> Result<Option<f64>> {
        self.settings.get(key).map_or(Ok(None), |value| match *value {
            Setting::Count(n) => Ok(Some(n as f64)),
            Setting::Number(n) if n.is_finite() => Ok(Some(n)),
            _ => Err(Error::setting(key, value, "a number")),
        })
    }

    /// Checks that there are no settings but these.
    ///
    /// # Errors
    /// [`Error::UnknownSetting`] naming the first other one.
    pub fn only(&self, known: &'static [&'static str]) -> Result<()> {
        match self.settings.keys().find(|key| !known.contains(&key.as_str())) {
            None => Ok(()),
            Some(key) => Err(Error::UnknownSetting { plugin: shown(&self.name), setting: shown(key), known }),
        }
    }
}

impl FromStr for Spec {
    type Err = Error;

    /// As command lines write it: `name`, or `name:setting=value:setting=value`.
    ///
    /// # Errors
    /// [`Error::Setting`] for what is no setting.
    fn from_str(text: &str) -> Result<Self> {
        let mut parts = text.split(':');
        let name = parts.next().unwrap_or_default();
        parts.try_fold(Self::new(name), |spec, part| match part.split_once('=') {
            Some((key, value)) if !key.is_empty() => Ok(spec.with(key, Setting::read(value))),
            _ => Err(Error::setting("a setting", part, "NAME=VALUE, as in window:sinks=4:recent=252")),
        })
    }
}

impl Setting {
    /// The value that a text stands for.
    fn read(text: &str) -> Self {
        match (text.parse(), text.parse(), text.parse()) {
            (Ok(flag), ..) => Self::Flag(flag),
            (_, Ok(n), _) => Self::Count(n),
            (.., Ok(n)) => Self::Number(n),
            _ => Self::Text(text.to_string()),
        }
    }
}

impl Display for Spec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let settings = self.settings.iter().map(|(key, value)| format!("{} {value}", shown(key)));
        let settings = settings.collect::<Vec<_>>().join(", ");
        write!(f, "{}", shown(&self.name))?;
        if settings.is_empty() { Ok(()) } else { write!(f, " ({settings})") }
    }
}

impl Display for Setting {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Flag(flag) => flag.fmt(f),
            Self::Count(n) => n.fmt(f),
            Self::Number(n) => n.fmt(f),
            Self::Text(text) => shown(text).fmt(f),
        }
    }
}

impl From<bool> for Setting {
    fn from(flag: bool) -> Self {
        Self::Flag(flag)
    }
}

impl From<usize> for Setting {
    fn from(n: usize) -> Self {
        Self::Count(n as u64)
    }
}

impl From<u64> for Setting {
    fn from(n: u64) -> Self {
        Self::Count(n)
    }
}

impl From<f64> for Setting {
    fn from(n: f64) -> Self {
        Self::Number(n)
    }
}

impl From<&str> for Setting {
    fn from(text: &str) -> Self {
        Self::Text(text.to_string())
    }
}

/// Makes a plugin from what a plan says of it.
pub type Make<T> = fn(&Spec) -> Result<Box<T>>;

/// The plugins of one kind that this crate has, by name: a new one is a line in its table.
#[derive(Debug)]
pub struct Registry<T: ?Sized + 'static> {
    kind: &'static str,
    plugins: &'static [(&'static str, Make<T>)],
}

impl<T: ?Sized> Registry<T> {
    pub(crate) const fn new(kind: &'static str, plugins: &'static [(&'static str, Make<T>)]) -> Self {
        Self { kind, plugins }
    }

    /// The names, in the order of the table.
    pub fn names(&self) -> impl Iterator<Item = &'static str> {
        self.plugins.iter().map(|(name, _)| *name)
    }

    /// The plugin that a spec describes.
    ///
    /// # Errors
    /// [`Error::UnknownPlugin`]; [`Error::Setting`] and [`Error::UnknownSetting`] for its settings.
    pub fn make(&self, spec: &Spec) -> Result<Box<T>> {
        let named = self.plugins.iter().find(|(name, _)| *name == spec.name);
        named.map(|(_, make)| make(spec)).unwrap_or_else(|| {
            let known = self.names().collect::<Vec<_>>().join(", ");
            Err(Error::UnknownPlugin { kind: self.kind, name: shown(&spec.name), known })
        })
    }

    /// The plugin of this name with its own settings.
    ///
    /// # Errors
    /// [`Error::UnknownPlugin`].
    pub fn by_name(&self, name: &str) -> Result<Box<T>> {
        self.make(&Spec::new(name))
    }
}
