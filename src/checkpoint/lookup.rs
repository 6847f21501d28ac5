//! Whose a directory is, and what to say where it is nobody's.

use std::path::{Path, PathBuf};

use super::{CONFIG, Config, Family, TensorIndex};
use crate::error::shown;
use crate::files::FileError;

/// Where a directory without config.json has some below it: training keeps steps, and a hub's cache snapshots.
pub(super) fn elsewhere(directory: &Path) -> String {
    const SHOWN: usize = 4;
    let below = |directory: &Path| -> Vec<PathBuf> {
        let entries = directory.read_dir().into_iter().flatten().flatten();
        let mut below: Vec<_> = entries.map(|entry| entry.path()).filter(|path| path.is_dir()).collect();
        below.sort();
        below
    };
    let deeper = below(&directory.join("snapshots"));
    let mut found = below(directory).into_iter().chain(deeper).filter(|path| path.join(CONFIG).is_file());
    let names: Vec<_> = found.by_ref().take(SHOWN).map(|path| path.display().to_string()).collect();
    let more = if found.next().is_some() { ", …" } else { "" };
    match names[..] {
        [] => "give the directory of a model of transformers, or download it again".to_string(),
        _ => format!("give the directory that has one: {}{more}", names.join(", ")),
    }
}

/// The family that knows the model type.
pub(super) fn family_of<'a>(
    config: &Config,
    families: &[&'a dyn Family],
) -> Result<&'a dyn Family, FileError> {
    let model_type = config.model_type()?;
    families.iter().copied().find(|family| family.model_types().contains(&model_type)).ok_or_else(|| {
        let known: Vec<_> = families.iter().flat_map(|family| family.model_types()).copied().collect();
        config.unsupported(
            format!("model_type \"{}\"", shown(model_type)),
            format!("supported are {}", known.join(", ")),
        )
    })
}

/// The error for a model type that nobody knows, with the families that have such tensors.
pub(super) fn resembling(
    error: FileError,
    config: &Config,
    tensors: &dyn TensorIndex,
    families: &[&dyn Family],
) -> FileError {
    const SHOWN: usize = 4;
    let FileError::Unsupported { path, mut unsupported } = error else { return error };
    let alike = |family: &&&dyn Family| {
        family.describe(config, tensors).is_ok_and(|described| described.forward.is_ok())
    };
    let found = families.iter().filter(alike).filter_map(|family| family.model_types().first().copied());
    let names: Vec<&str> = found.take(SHOWN).collect();
    if !names.is_empty() {
        let names = names.join(", ");
        unsupported.hint += &format!(
            "; its tensors are those of {names}: if it is one of these under another name, say so in `model_type`"
        );
    }
    FileError::Unsupported { path, unsupported }
}
