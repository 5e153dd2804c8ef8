//! One definition of every setting, four places to give it: command line, environment, file, default; the first one wins.
//!
//! The definition is clap's. Every option of any command has an environment variable (`KVROUTER_` and its name) and a key
//! in the file (its long name) without doing anything for it: what the file says and nobody else is put in front of the
//! command line before clap parses it.
#![forbid(unsafe_code)]

use std::collections::HashMap;
use std::ffi::{OsStr, OsString};
use std::fmt;
use std::path::PathBuf;

use clap::builder::{BoolishValueParser, Resettable};
use clap::error::{ContextKind, ContextValue, ErrorKind};
use clap::parser::ValueSource;
use clap::{Arg, ArgAction, ArgMatches, Command};

use super::file::{self, Entry, Problem, Stamp};

/// The option that names the file.
pub const FILE_OPTION: &str = "config";

/// What the names of all environment variables begin with.
pub const ENVIRONMENT_PREFIX: &str = "KVROUTER_";

/// How alike two names are when one is offered for the other; 1 is the same.
const LIKENESS_MIN: f64 = 0.75;

/// Where a setting's value comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Origin {
    /// The command line.
    Flag,
    /// This environment variable.
    Environment(String),
    /// The file, at `PATH:LINE`.
    File(String),
    /// Nobody set it.
    Default,
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Flag => f.write_str("command line"),
            Self::Environment(name) => f.write_str(name),
            Self::File(place) => f.write_str(place),
            Self::Default => f.write_str("default"),
        }
    }
}

/// One setting as it is in effect.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Setting {
    /// The option's long name.
    pub name: String,
    /// Its values; none: it is not set and has no default.
    pub values: Vec<String>,
    /// Who says so.
    pub origin: Origin,
    /// Its value is not to be shown.
    pub is_secret: bool,
}

/// The outcome of all four places.
#[derive(Debug)]
pub struct Layers {
    /// What clap makes typed values from.
    pub matches: ArgMatches,
    /// Every setting, in the order of its definition.
    pub settings: Vec<Setting>,
    /// What is odd without being wrong.
    pub warnings: Vec<Problem>,
    /// The file that was read.
    pub file: Option<PathBuf>,
    /// That file, just before it was read.
    pub stamp: Option<Stamp>,
}

/// Reads the settings of `command` from all places; the first of `args` is the program's name.
///
/// # Errors
/// clap's error, which is also how `--help` arrives. It names everything that is wrong with the file.
pub fn read(command: Command, args: &[OsString]) -> Result<Layers, clap::Error> {
    let secrets: Vec<String> = command
        .get_arguments()
        .filter(|arg| arg.is_hide_env_values_set())
        .map(|arg| arg.get_id().to_string())
        .collect();
    let mut places = HashMap::new();
    let mut args = args.to_vec();
    let warnings = unknown_variables(&command);
    let command = command.mut_args(flag_with_value);
    // What the file says is judged without what others say.
    let alone = command
        .clone()
        .mut_args(|arg| arg.required(false).env(Resettable::Reset));
    let mut command = command.mut_args(|arg| with_environment(arg, &mut places));
    let file = file_option(&args);
    // Before it is read: what changes then is seen as a change.
    let stamp = file.as_deref().and_then(Stamp::of);
    if let Some(path) = &file {
        let refuse = |problems: Vec<Problem>, command: &mut Command| {
            let lines: Vec<_> = problems.iter().map(Problem::to_string).collect();
            command.error(ErrorKind::ValueValidation, lines.join("\n       "))
        };
        let entries = file::read(path).map_err(|problems| refuse(problems, &mut command))?;
        let problems: Vec<_> = entries
            .iter()
            .filter_map(|entry| check_entry(&alone, entry))
            .collect();
        if !problems.is_empty() {
            return Err(refuse(problems, &mut command));
        }
        let at = args.len().min(1);
        for entry in entries {
            let id = id_of(&command, &entry.key).unwrap_or_default();
            if places.contains_key(&id) || is_given(&command, &id, &args) {
                continue;
            }
            places.insert(id.clone(), Origin::File(entry.place.clone()));
            // In front of the others, so that clap checks what belongs together wherever it stands.
            args.splice(at..at, as_arguments(&entry, takes_several(&command, &id)));
        }
    }
    let matches = command
        .try_get_matches_from_mut(&args)
        .map_err(|error| name_variable(&mut command, error))?;
    let settings = command
        .get_arguments()
        .filter(|arg| is_setting(arg))
        .map(|arg| setting(arg, &matches, &places, &secrets))
        .collect();
    Ok(Layers {
        matches,
        settings,
        warnings,
        file,
        stamp,
    })
}

fn is_setting(arg: &Arg) -> bool {
    arg.get_long().is_some()
        && !matches!(
            arg.get_action(),
            ArgAction::Help | ArgAction::HelpShort | ArgAction::HelpLong | ArgAction::Version
        )
}

fn setting(
    arg: &Arg,
    matches: &ArgMatches,
    places: &HashMap<String, Origin>,
    secrets: &[String],
) -> Setting {
    let id = arg.get_id().as_str();
    let values = matches.get_raw(id).into_iter().flatten();
    let origin = match (places.get(id), matches.value_source(id)) {
        (Some(file @ Origin::File(_)), _) => file.clone(),
        (_, Some(ValueSource::CommandLine)) => Origin::Flag,
        (_, Some(ValueSource::EnvVariable)) => Origin::Environment(variable_of(arg)),
        (place, _) => place.cloned().unwrap_or(Origin::Default),
    };
    Setting {
        name: arg.get_long().unwrap_or_default().to_owned(),
        values: values
            .map(|value| value.to_string_lossy().into_owned())
            .collect(),
        origin,
        is_secret: secrets.iter().any(|secret| secret == id),
    }
}

/// Lets `--flag` be taken back: a flag that the file or the environment sets is cleared by `--flag=false`.
fn flag_with_value(arg: Arg) -> Arg {
    if !matches!(arg.get_action(), ArgAction::SetTrue) {
        return arg;
    }
    arg.action(ArgAction::Set)
        .num_args(0..=1)
        .require_equals(true)
        .default_missing_value("true")
        .default_value("false")
        .value_parser(BoolishValueParser::new())
        .value_name("BOOL")
        .hide_possible_values(true)
        .hide_default_value(true)
}

/// The environment variable of an option.
fn variable_of(arg: &Arg) -> String {
    let given = arg.get_env().and_then(OsStr::to_str);
    given.map_or_else(
        || {
            let name = arg.get_long().unwrap_or_default();
            format!(
                "{ENVIRONMENT_PREFIX}{}",
                name.replace('-', "_").to_uppercase()
            )
        },
        str::to_owned,
    )
}

/// Gives an option its environment variable. A list's values stand there with spaces between, which clap cannot split, so
/// they become its default here.
fn with_environment(arg: Arg, places: &mut HashMap<String, Origin>) -> Arg {
    if !is_setting(&arg) {
        return arg;
    }
    let variable = variable_of(&arg);
    let value = std::env::var_os(&variable).filter(|value| !is_service_link(value));
    if !matches!(arg.get_action(), ArgAction::Append) {
        // Kubernetes' variables must not be taken for ours; nor is an empty one a value.
        return if value.as_ref().is_none_or(|value| value.is_empty())
            && std::env::var_os(&variable).is_some()
        {
            arg.env(Resettable::Reset)
        } else {
            arg.env(variable).hide_env_values(true)
        };
    }
    let note = format!("[env: {variable}, with spaces between]");
    let help = arg.get_help().map(ToString::to_string).unwrap_or_default();
    let arg = arg.help(format!("{help} {note}"));
    let values: Vec<String> = value
        .iter()
        .flat_map(|value| value.to_str())
        .flat_map(str::split_whitespace)
        .map(str::to_owned)
        .collect();
    if values.is_empty() {
        return arg;
    }
    let id = arg.get_id().to_string();
    places.insert(id, Origin::Environment(variable));
    arg.default_values(values).required(false)
}

/// A Service named `kvrouter` makes Kubernetes set `KVROUTER_PORT=tcp://10.0.0.1:8080` in every container of its
/// namespace, the router's own among them. That is no port.
fn is_service_link(value: &OsStr) -> bool {
    let text = value.to_str().unwrap_or_default();
    ["tcp://", "udp://", "sctp://"]
        .iter()
        .any(|scheme| text.starts_with(scheme))
}

fn unknown_variables(command: &Command) -> Vec<Problem> {
    let known: Vec<String> = command
        .get_arguments()
        .filter(|arg| is_setting(arg))
        .map(variable_of)
        .collect();
    let mut problems: Vec<_> = std::env::vars_os()
        .filter_map(|(name, value)| {
            let name = name.into_string().ok()?;
            let rest = name.strip_prefix(ENVIRONMENT_PREFIX)?;
            let is_link = rest.starts_with("SERVICE_") || rest.starts_with("PORT_");
            if known.contains(&name) || is_link || is_service_link(&value) {
                return None;
            }
            let near = nearest(&name, known.iter().map(String::as_str));
            Some(Problem {
                text: format!("no setting has this variable{near}"),
                place: name,
            })
        })
        .collect();
    problems.sort_by(|a, b| a.place.cmp(&b.place));
    problems
}

/// What a message adds when one of `known` looks like `name`.
fn nearest<'a>(name: &str, known: impl Iterator<Item = &'a str>) -> String {
    let scored = known.map(|other| (strsim::jaro_winkler(name, other), other));
    scored
        .filter(|(score, _)| *score >= LIKENESS_MIN)
        .max_by(|a, b| a.0.total_cmp(&b.0))
        .map(|(_, other)| format!("; did you mean `{other}`?"))
        .unwrap_or_default()
}

/// The file named by the command line, or by the environment.
fn file_option(args: &[OsString]) -> Option<PathBuf> {
    let long = format!("--{FILE_OPTION}");
    let mut named = None;
    let mut rest = args.iter().skip(1);
    while let Some(arg) = rest.next() {
        let text = arg.to_string_lossy();
        if text == "--" {
            break;
        } else if text == long {
            named = rest.next().map(PathBuf::from);
        } else if let Some(path) = text
            .strip_prefix(&long)
            .and_then(|tail| tail.strip_prefix('='))
        {
            named = Some(PathBuf::from(path));
        }
    }
    named.or_else(|| {
        let variable = format!("{ENVIRONMENT_PREFIX}{}", FILE_OPTION.to_uppercase());
        let path = std::env::var_os(variable)?;
        (!path.is_empty()).then(|| path.into())
    })
}

fn id_of(command: &Command, key: &str) -> Option<String> {
    command
        .get_arguments()
        .find(|arg| is_setting(arg) && arg.get_long() == Some(key) && key != FILE_OPTION)
        .map(|arg| arg.get_id().to_string())
}

/// Whether the command line or the environment gives an option.
fn is_given(command: &Command, id: &str, args: &[OsString]) -> bool {
    let Some(arg) = command
        .get_arguments()
        .find(|arg| arg.get_id().as_str() == id)
    else {
        return false;
    };
    let long = format!("--{}", arg.get_long().unwrap_or_default());
    let mut args = args.iter().skip(1).map(|arg| arg.to_string_lossy());
    let is_flag = args.any(|arg| {
        let rest = arg.strip_prefix(&long);
        rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('='))
    });
    is_flag
        || arg
            .get_env()
            .is_some_and(|name| std::env::var_os(name).is_some())
}

/// A setting of the file as arguments. `several` says that an address and its port stand in one text, as
/// `"http://10.0.0.1:30000 8998"`.
fn as_arguments(entry: &Entry, several: bool) -> Vec<OsString> {
    let key = &entry.key;
    let mut made = Vec::new();
    for value in &entry.values {
        if several {
            made.push(format!("--{key}").into());
            made.extend(value.split_whitespace().map(OsString::from));
        } else {
            made.push(format!("--{key}={value}").into());
        }
    }
    made
}

/// Whether one occurrence of an option may be followed by several values.
fn takes_several(command: &Command, id: &str) -> bool {
    let mut arguments = command.get_arguments();
    let arg = arguments.find(|arg| arg.get_id().as_str() == id);
    arg.and_then(Arg::get_num_args)
        .is_some_and(|values| values.max_values() > 1)
}

/// What is wrong with one setting of the file.
fn check_entry(command: &Command, entry: &Entry) -> Option<Problem> {
    let refuse = |text| {
        Some(Problem {
            place: entry.place.clone(),
            text,
        })
    };
    let key = &entry.key;
    let Some(id) = id_of(command, key) else {
        let known = command.get_arguments().filter(|arg| is_setting(arg));
        let known = known
            .filter_map(Arg::get_long)
            .filter(|name| *name != FILE_OPTION);
        let near = nearest(key, known);
        return refuse(format!("there is no setting `{key}`{near}"));
    };
    let is_repeatable = command
        .get_arguments()
        .any(|arg| arg.get_id().as_str() == id && matches!(arg.get_action(), ArgAction::Append));
    if entry.is_list && !is_repeatable {
        return refuse(format!("`{key}` takes one value, not a list"));
    }
    // clap reads the values alone, as if they stood on a command line of their own.
    let line = std::iter::once("kvrouter".to_owned())
        .chain(entry.values.iter().map(|value| format!("--{key}={value}")));
    let error = command.clone().try_get_matches_from(line).err()?;
    if is_of_value(&error) {
        refuse(one_line(&error))
    } else {
        None
    }
}

fn is_of_value(error: &clap::Error) -> bool {
    matches!(
        error.kind(),
        ErrorKind::InvalidValue | ErrorKind::ValueValidation
    )
}

/// What clap says, without its advice to read the help.
fn one_line(error: &clap::Error) -> String {
    let text = error.to_string();
    let said = text.strip_prefix("error: ").unwrap_or(&text);
    let lines = said
        .lines()
        .map(str::trim)
        .take_while(|line| !line.starts_with("For more"))
        .filter(|line| !line.is_empty());
    lines.collect::<Vec<_>>().join(" ")
}

/// clap blames the option for a bad value; where an environment variable holds it, that is named too.
fn name_variable(command: &mut Command, error: clap::Error) -> clap::Error {
    let Some(ContextValue::String(option)) = error.get(ContextKind::InvalidArg) else {
        return error;
    };
    let Some(ContextValue::String(value)) = error.get(ContextKind::InvalidValue) else {
        return error;
    };
    let name = option.split_whitespace().next().unwrap_or_default();
    let variable = command
        .get_arguments()
        .find(|arg| arg.get_long() == name.strip_prefix("--"))
        .map(variable_of);
    let Some(variable) = variable.filter(|variable| {
        let found = std::env::var(variable).unwrap_or_default();
        is_of_value(&error) && found.contains(value.as_str())
    }) else {
        return error;
    };
    let text = format!("{variable}: {}", one_line(&error));
    command.error(error.kind(), text)
}
