//! YAML files of several objects.

use serde_json::Value as Json;

/// The objects of a file, with what would be its comments left out.
pub fn documents(text: &str) -> Vec<Json> {
    let parts = text.split("\n---");
    let parts = parts.map(|part| {
        kvrouter::discover::file::from_yaml::<Json>(part)
            .unwrap_or_else(|mistake| panic!("{mistake:?} in {part}"))
    });
    parts.filter(|object| !object.is_null()).collect()
}
