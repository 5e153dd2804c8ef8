//! Reads the members of an object and remembers what was wrong with them.
#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::fmt;

use serde_json::{Map, Value as Json};

use super::{shown, text_map};

/// Something wrong with a field.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Flaw {
    /// Where: `spec.profile.pd.kvTransfer.bootstrapPort`.
    pub path: String,
    /// What.
    pub kind: FlawKind,
}

/// What is wrong with a field.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FlawKind {
    /// Nothing of that name is known there.
    Unknown {
        /// The names that are.
        known: Vec<&'static str>,
    },
    /// It must be there.
    Missing,
    /// It is no value that fits.
    Invalid {
        /// What stands there.
        found: String,
        /// What would fit.
        wanted: &'static str,
    },
    /// It is understood, and this router cannot do it.
    Unsupported {
        /// Why, and what to do.
        why: &'static str,
    },
}

impl fmt::Display for Flaw {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let path = &self.path;
        match &self.kind {
            FlawKind::Unknown { known } => {
                write!(
                    f,
                    "{path} is no known field; known here: {}",
                    known.join(", ")
                )
            }
            FlawKind::Missing => write!(f, "{path} is missing"),
            FlawKind::Invalid { found, wanted } => {
                write!(f, "{path} is {found}, and must be {wanted}")
            }
            FlawKind::Unsupported { why } => write!(f, "{path} is not supported: {why}"),
        }
    }
}

/// The members of one object, read one by one.
#[derive(Debug)]
pub struct Fields<'a> {
    path: String,
    members: Option<&'a Map<String, Json>>,
    known: Vec<&'static str>,
    flaws: Vec<Flaw>,
}

impl<'a> Fields<'a> {
    /// The members of `value`, which stands at `path`.
    pub fn new(path: impl Into<String>, value: &'a Json) -> Self {
        let path = path.into();
        let mut flaws = Vec::new();
        if !value.is_object() && !value.is_null() {
            flaws.push(Flaw {
                path: path.clone(),
                kind: FlawKind::Invalid {
                    found: shown(value),
                    wanted: "an object",
                },
            });
        }
        Self {
            path,
            members: value.as_object(),
            known: Vec::new(),
            flaws,
        }
    }

    fn path_of(&self, name: &str) -> String {
        if self.path.is_empty() {
            name.to_owned()
        } else {
            format!("{}.{name}", self.path)
        }
    }

    /// The member `name`, unless it is absent or null.
    pub fn value(&mut self, name: &'static str) -> Option<&'a Json> {
        self.known.push(name);
        self.members?.get(name).filter(|value| !value.is_null())
    }

    /// The member `name`, whose absence is a flaw.
    pub fn required(&mut self, name: &'static str) -> Option<&'a Json> {
        let value = self.value(name);
        if value.is_none() {
            self.flaw(name, FlawKind::Missing);
        }
        value
    }

    /// Notes a flaw of the member `name`.
    pub fn flaw(&mut self, name: &str, kind: FlawKind) {
        let path = self.path_of(name);
        self.flaws.push(Flaw { path, kind });
    }

    fn read<T>(
        &mut self,
        name: &'static str,
        value: Option<&'a Json>,
        wanted: &'static str,
        read: impl FnOnce(&'a Json) -> Option<T>,
    ) -> Option<T> {
        let value = value?;
        let found = read(value);
        if found.is_none() {
            let found = shown(value);
            self.flaw(name, FlawKind::Invalid { found, wanted });
        }
        found
    }

    /// A text that is not empty.
    pub fn text(&mut self, name: &'static str) -> Option<&'a str> {
        let value = self.value(name);
        self.read(name, value, "a text", filled)
    }

    /// A text whose absence is a flaw.
    pub fn required_text(&mut self, name: &'static str) -> Option<&'a str> {
        let value = self.required(name);
        self.read(name, value, "a text", filled)
    }

    /// A port.
    pub fn port(&mut self, name: &'static str) -> Option<u16> {
        let value = self.value(name);
        self.read(name, value, "a port from 1 to 65535", port)
    }

    /// A port whose absence is a flaw.
    pub fn required_port(&mut self, name: &'static str) -> Option<u16> {
        let value = self.required(name);
        self.read(name, value, "a port from 1 to 65535", port)
    }

    /// A whole number that an `i32` holds.
    pub fn integer(&mut self, name: &'static str) -> Option<i32> {
        let value = self.value(name);
        self.read(name, value, "a whole number", |value| {
            i32::try_from(value.as_i64()?).ok()
        })
    }

    /// The share of a target: a whole number from 0.
    pub fn weight(&mut self, name: &'static str) -> Option<u32> {
        let value = self.value(name);
        self.read(name, value, "a whole number from 0 to 1000000", |value| {
            let weight = u32::try_from(value.as_u64()?).ok()?;
            (weight <= WEIGHT_MAX).then_some(weight)
        })
    }

    /// Texts by key, whose absence is a flaw.
    pub fn required_texts(&mut self, name: &'static str) -> Option<BTreeMap<String, String>> {
        let value = self.required(name);
        self.read(name, value, "an object of texts", |value| {
            let all = text_map(value);
            (value.as_object()?.len() == all.len()).then_some(all)
        })
    }

    /// The elements of a list; empty if it is absent.
    pub fn list(&mut self, name: &'static str) -> &'a [Json] {
        let value = self.value(name);
        let list = self.read(name, value, "a list", Json::as_array);
        list.map_or(&[], Vec::as_slice)
    }

    /// The members of the object `name`, if it is there. Give it back with [`Fields::close`].
    pub fn object(&mut self, name: &'static str) -> Option<Self> {
        let value = self.value(name)?;
        Some(Self::new(self.path_of(name), value))
    }

    /// The members of the object `name`, whose absence is a flaw.
    pub fn required_object(&mut self, name: &'static str) -> Option<Self> {
        let value = self.required(name)?;
        Some(Self::new(self.path_of(name), value))
    }

    /// Takes over the flaws of an object inside; its unread members are no flaws.
    pub fn close(&mut self, inner: Self) {
        self.flaws.extend(inner.flaws);
    }

    /// Takes over the flaws of an object inside, of which every unread member is one.
    pub fn close_strictly(&mut self, mut inner: Self) {
        inner.refuse_unknown();
        self.flaws.extend(inner.flaws);
    }

    /// Makes a flaw of every member that was not asked for.
    pub fn refuse_unknown(&mut self) {
        let unknown = self.members.into_iter().flat_map(Map::keys);
        let unknown: Vec<&String> = unknown
            .filter(|name| !self.known.contains(&name.as_str()))
            .collect();
        for name in unknown {
            let known = self.known.clone();
            self.flaw(name, FlawKind::Unknown { known });
        }
    }

    /// What was wrong.
    pub fn into_flaws(self) -> Vec<Flaw> {
        self.flaws
    }
}

/// Largest weight that the Kubernetes API admits.
const WEIGHT_MAX: u32 = 1_000_000;

fn filled(value: &Json) -> Option<&str> {
    value.as_str().filter(|text| !text.is_empty())
}

fn port(value: &Json) -> Option<u16> {
    u16::try_from(value.as_u64()?)
        .ok()
        .filter(|port| *port != 0)
}
