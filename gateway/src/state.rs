//! The file that keeps keys and their state over restarts.

use std::{
    env, fs, io,
    path::{Path, PathBuf},
    str::FromStr,
};

/// Where keys and their state are kept.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) enum State {
    /// In a file for each upstream.
    #[default]
    Default,
    File(PathBuf),
    /// In memory only.
    None,
}

impl FromStr for State {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "" => Err("it must be a file or none"),
            "none" => Ok(Self::None),
            path => Ok(Self::File(path.into())),
        }
    }
}

/// The file for the keys of an upstream if no setting names one, and its directory, which may have to be made.
///
/// Each upstream has a file of its own: keys that were added for one must not reach another.
pub(crate) fn default_file(upstream: &str) -> PathBuf {
    let is_plain = |c: char| c.is_ascii_alphanumeric() || c == '.' || c == '-';
    let name: String = upstream.chars().map(|c| if is_plain(c) { c } else { '_' }).collect();
    directory(|name| env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from))
        .join(format!("{name}.redb"))
}

/// That of systemd (`StateDirectory=`) or the image, of the desktop's conventions, or the working directory.
fn directory(variable: impl Fn(&str) -> Option<PathBuf>) -> PathBuf {
    const NAME: &str = "key-rotation-gateway";
    if let Some(directories) = variable("STATE_DIRECTORY") {
        // systemd names all of a service's, with colons between them.
        return env::split_paths(&directories).next().unwrap_or_default();
    }
    let state = variable("XDG_STATE_HOME").filter(|path| path.is_absolute());
    let state = state.or_else(|| Some(variable("HOME")?.join(".local/state")));
    let state = state.or_else(|| variable("LOCALAPPDATA"));
    state.map_or_else(PathBuf::new, |state| state.join(NAME))
}

/// Makes the directory of a file, if there is none: for this user alone.
pub(crate) fn make_directory(file: &Path) -> io::Result<()> {
    let Some(directory) = file.parent().filter(|directory| !directory.as_os_str().is_empty()) else {
        return Ok(());
    };
    let mut builder = fs::DirBuilder::new();
    builder.recursive(true);
    #[cfg(unix)]
    std::os::unix::fs::DirBuilderExt::mode(&mut builder, 0o700);
    builder.create(directory)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with<const N: usize>(variables: [(&str, &str); N]) -> PathBuf {
        directory(|name| variables.iter().find(|(known, _)| *known == name).map(|(_, value)| value.into()))
    }

    #[test]
    fn the_default_directory_is_systemds_or_the_users() {
        let (systemd, xdg) = (("STATE_DIRECTORY", "/var/lib/gw:/var/lib/other"), ("XDG_STATE_HOME", "/x"));
        assert_eq!(with([xdg, systemd]), Path::new("/var/lib/gw"));
        assert_eq!(with([xdg, ("HOME", "/home/me")]), Path::new("/x/key-rotation-gateway"));
        let home = with([("XDG_STATE_HOME", "relative"), ("HOME", "/home/me")]);
        assert_eq!(home, Path::new("/home/me/.local/state/key-rotation-gateway"));
        assert_eq!(with([]), Path::new(""));
    }

    #[test]
    fn each_upstream_has_a_default_file_of_its_own() {
        let name = |upstream| default_file(upstream).file_name().unwrap().to_owned();
        assert_eq!(name("api.openai.com"), "api.openai.com.redb");
        assert_eq!(name("127.0.0.1:8080"), "127.0.0.1_8080.redb");
        assert_eq!(name("[::1]:80"), "___1__80.redb");
    }
}
