//! The few bytes that go with a connect, accept or reject.
#![forbid(unsafe_code)]

use super::super::error::VerbsError;

/// Most bytes of private data, with the byte of its length: what InfiniBand's connect carries for librdmacm.
pub(crate) const PRIVATE_DATA_WIRE_MAX: usize = 56;

/// Most bytes of private data that a caller can send.
pub(crate) const PRIVATE_DATA_MAX: usize = PRIVATE_DATA_WIRE_MAX - 1;

/// A few bytes that go with a connect, accept or reject.
///
/// RoCE pads them to 56, so they carry their own length in front.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct PrivateData {
    len: u8,
    bytes: [u8; PRIVATE_DATA_MAX],
}

impl PrivateData {
    /// Takes at most [`PRIVATE_DATA_MAX`] bytes.
    pub(crate) fn new(from: &[u8]) -> Result<Self, VerbsError> {
        let mut bytes = [0; PRIVATE_DATA_MAX];
        let room = bytes.get_mut(..from.len()).ok_or(VerbsError::Limit {
            what: "bytes of private data",
            asked: from.len() as u64,
            limit: PRIVATE_DATA_MAX as u64,
        })?;
        room.copy_from_slice(from);
        let len = u8::try_from(from.len()).unwrap_or(u8::MAX);
        Ok(Self { len, bytes })
    }

    /// The bytes.
    pub(crate) fn as_slice(&self) -> &[u8] {
        &self.bytes[..usize::from(self.len)]
    }

    pub(super) fn encode(&self) -> ([u8; PRIVATE_DATA_WIRE_MAX], u8) {
        let mut wire = [0; PRIVATE_DATA_WIRE_MAX];
        wire[0] = self.len;
        wire[1..].copy_from_slice(&self.bytes);
        (wire, self.len + 1)
    }

    /// Reads what a peer sent; `None` if it is not of this form.
    pub(super) fn decode(wire: &[u8]) -> Option<Self> {
        let (&len, rest) = wire.split_first()?;
        Self::new(rest.get(..usize::from(len))?).ok()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn private_data_survives_padding(bytes in prop::collection::vec(any::<u8>(), 0..=PRIVATE_DATA_MAX)) {
            let data = PrivateData::new(&bytes).expect("within the bound");
            let (wire, len) = data.encode();
            prop_assert!(usize::from(len) <= PRIVATE_DATA_WIRE_MAX);
            let exact = PrivateData::decode(&wire[..usize::from(len)]).expect("as iWARP brings it");
            let padded = PrivateData::decode(&wire).expect("as RoCE brings it");
            prop_assert_eq!(exact.as_slice(), &bytes[..]);
            prop_assert_eq!(padded.as_slice(), &bytes[..]);
        }

        #[test]
        fn whatever_a_peer_sends_is_read_or_refused(wire in prop::collection::vec(any::<u8>(), 0..=255)) {
            if let Some(data) = PrivateData::decode(&wire) {
                prop_assert_eq!(data.as_slice(), &wire[1..=usize::from(wire[0])]);
            }
        }
    }

    #[test]
    fn private_data_has_a_bound() {
        assert!(PrivateData::new(&[0; PRIVATE_DATA_MAX]).is_ok());
        assert_eq!(
            PrivateData::new(&[0; PRIVATE_DATA_MAX + 1]),
            Err(VerbsError::Limit {
                what: "bytes of private data",
                asked: 56,
                limit: 55,
            })
        );
        assert_eq!(PrivateData::decode(&[]), None);
        assert_eq!(PrivateData::decode(&[2, 1]), None);
        assert_eq!(PrivateData::decode(&[56; 200]), None);
    }
}
