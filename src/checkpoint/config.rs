use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use crate::files::{FileError, without_mark};
use crate::model::Unsupported;

/// A config.json, read key by key; `null` is as good as missing.
///
/// What a key means, and what it is where it is missing, is for a [`Family`](super::Family) to know.
#[derive(Debug, Clone, PartialEq)]
pub struct Config {
    path: PathBuf,
    raw: Map<String, Value>,
}

impl Config {
    /// Parses the text of a file.
    ///
    /// # Errors
    /// [`FileError::Json`] for what is no object.
    pub fn parse(path: impl Into<PathBuf>, text: &[u8]) -> Result<Self, FileError> {
        let path = path.into();
        let text = without_mark(text);
        let raw = serde_json::from_slice(text).map_err(|source| FileError::json(&path, text, source))?;
        Ok(Self { path, raw })
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// All keys, in their order.
    pub fn raw(&self) -> &Map<String, Value> {
        &self.raw
    }

    /// A value, where it is given.
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.raw.get(key).filter(|v| !v.is_null())
    }

    /// An object within it as a configuration of its own, where there is one: the text part of a model of several.
    pub fn inner(&self, key: &str) -> Option<Self> {
        let raw = self.get(key)?.as_object()?.clone();
        Some(Self { path: self.path.clone(), raw })
    }

    /// `model_type`.
    ///
    /// # Errors
    /// [`FileError::ConfigMissing`], [`FileError::ConfigValue`].
    pub fn model_type(&self) -> Result<&str, FileError> {
        match self.get("model_type") {
            Some(Value::String(name)) => Ok(name),
            Some(other) => Err(self.wrong("model_type", "a string", other)),
            None => Err(self.missing("model_type")),
        }
    }

    /// A whole number from 1 on, where it is given.
    ///
    /// # Errors
    /// [`FileError::ConfigValue`].
    pub fn count(&self, key: &'static str) -> Result<Option<usize>, FileError> {
        let Some(value) = self.get(key) else { return Ok(None) };
        let number = value.as_u64().and_then(|n| usize::try_from(n).ok()).filter(|&n| n > 0);
        number.map(Some).ok_or_else(|| self.wrong(key, "a whole number from 1 on", value))
    }

    /// A whole number from 0 on, where it is given.
    ///
    /// # Errors
    /// [`FileError::ConfigValue`].
    pub fn index(&self, key: &'static str) -> Result<Option<usize>, FileError> {
        let Some(value) = self.get(key) else { return Ok(None) };
        let number = value.as_u64().and_then(|n| usize::try_from(n).ok());
        number.map(Some).ok_or_else(|| self.wrong(key, "a whole number from 0 on", value))
    }

    /// A number above 0, where it is given.
    ///
    /// # Errors
    /// [`FileError::ConfigValue`].
    pub fn positive(&self, key: &'static str) -> Result<Option<f64>, FileError> {
        let Some(value) = self.get(key) else { return Ok(None) };
        let number = value.as_f64().filter(|&n| n > 0.0 && n.is_finite());
        number.map(Some).ok_or_else(|| self.wrong(key, "a number above 0", value))
    }

    /// A whole number from 1 on that must be there.
    ///
    /// # Errors
    /// [`FileError::ConfigMissing`], [`FileError::ConfigValue`].
    pub fn required(&self, key: &'static str) -> Result<usize, FileError> {
        self.count(key)?.ok_or_else(|| self.missing(key))
    }

    /// Yes or no; no where it is not given.
    ///
    /// # Errors
    /// [`FileError::ConfigValue`].
    pub fn flag(&self, key: &'static str) -> Result<bool, FileError> {
        Ok(self.given_flag(key)?.unwrap_or(false))
    }

    /// Yes or no, where it is given.
    ///
    /// # Errors
    /// [`FileError::ConfigValue`].
    pub fn given_flag(&self, key: &'static str) -> Result<Option<bool>, FileError> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Bool(flag)) => Ok(Some(*flag)),
            Some(other) => Err(self.wrong(key, "true or false", other)),
        }
    }

    /// The error for a key that must be there.
    pub fn missing(&self, key: &'static str) -> FileError {
        FileError::ConfigMissing { path: self.path.clone(), key }
    }

    /// The error for a value that cannot be.
    pub fn wrong(&self, key: &'static str, expected: impl Into<String>, found: impl ToString) -> FileError {
        let (expected, found) = (expected.into(), found.to_string());
        FileError::ConfigValue { path: self.path.clone(), key, expected, found }
    }

    /// The error for a model that cannot be dealt with.
    pub fn unsupported(&self, what: impl Into<String>, hint: impl Into<String>) -> FileError {
        FileError::Unsupported { path: self.path.clone(), unsupported: Unsupported::new(what, hint) }
    }
}
